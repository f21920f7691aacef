"""Small documents, token files and tokenizers, for tests of corpora."""

import gzip
import json
import random

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

WORDS = ["alpha", "beta", "gamma", "épsilon", "ζeta", "日本", "naïve", "🙂", "if", "the"]
WORDS += ["of\tand\r\nnext"]


def make_documents(count, seed=0):
    """Documents of 5 to 40 words, partly non-ASCII, with both kinds of line ends."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + f" #{number}\n"
        for number in range(count)
    ]


def write_json_lines(file, documents, key="text"):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"url": "x", key: document}) + "\n" for document in documents)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif file.suffix == ".zst":
        import zstandard

        file.write_bytes(zstandard.compress(lines.encode()))
    else:
        file.write_text(lines, encoding="utf-8")


def write_parquet(file, row_group_size=None, **columns):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=row_group_size)


def write_nanogpt(file, documents, eos_id, dtype="uint16"):
    """Writes token ids without a header, as nanoGPT does."""
    file.parent.mkdir(parents=True, exist_ok=True)
    flat = [token for ids in documents for token in (*ids, eos_id)]
    file.write_bytes(np.array(flat, dtype=dtype).tobytes())


def save_tokenizer(file, *special_tokens, ids_from=0, template="</s> $A"):
    """A word-level tokenizer that truncates and pads by default, which a corpus must ignore, and
    puts a text into a template."""
    vocabulary = {"[UNK]": ids_from, "a": ids_from + 1, "b": ids_from + 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    special = [(token, tokenizer.token_to_id(token)) for token in special_tokens]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template.replace("</s>", special_tokens[0]), special_tokens=special
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(file))
    return file
