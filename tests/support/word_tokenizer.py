"""A tokenizer file with settings that a corpus must ignore."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors


def save_tokenizer(file: Path, *special_tokens: str, ids_from: int = 0) -> Path:
    """A word-level tokenizer that truncates, pads and prepends a token by default."""
    vocabulary = {"[UNK]": ids_from, "a": ids_from + 1, "b": ids_from + 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special_tokens[0]} $A", special_tokens=[(special_tokens[0], 3)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return file
