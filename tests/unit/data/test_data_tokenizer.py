import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from switchtitan.config.errors import CorpusError
from switchtitan.data.tokenizer import fetch_tokenizer, read_tokenizer, train_tokenizer


def save_tokenizer(file: Path, *special_tokens: str, ids_from: int = 0) -> Path:
    """A word-level tokenizer that truncates, pads and puts a token in front unless told not to."""
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


def test_a_trained_tokenizer_gives_every_text_back(documents: list[str]) -> None:
    tokenizer = train_tokenizer(documents, 300)
    assert 257 <= tokenizer.vocab_size <= 300
    for text in [*documents, "unseen \x00 ★ Ж\r\n\t  end", "<|endoftext|> in a text"]:
        (ids,) = tokenizer.encode_documents([text])
        assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.eos_id not in ids


def test_training_twice_gives_the_same_tokenizer(documents: list[str]) -> None:
    assert train_tokenizer(documents, 290).sha256 == train_tokenizer(iter(documents), 290).sha256


def test_documents_are_encoded_whole_without_additions(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    tokenizer = read_tokenizer(file)
    assert tokenizer.encode_documents(["a b a b", "b"]) == [[1, 2, 1, 2], [2]]
    assert read_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("token", ["</s>", "<|endoftext|>", "<eos>"])
def test_the_usual_end_tokens_are_found(tmp_path: Path, token: str) -> None:
    tokenizer = read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "<pad>", token))
    assert (tokenizer.eos_token, tokenizer.eos_id, tokenizer.vocab_size) == (token, 4, 5)


@pytest.mark.parametrize("setting", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_settings_beside_the_tokenizer_name_the_end_token(tmp_path: Path, setting: object) -> None:
    save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<stop>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": setting}))
    assert read_tokenizer(tmp_path).eos_token == "<stop>"


def test_vocabulary_size_is_the_largest_id_and_one(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", ids_from=70)
    assert read_tokenizer(file).vocab_size == 73


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no token that ends a document; expected one of </s>"):
        read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "[SEP]"))


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"there is no file .*tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match=r"tokenizer\.json: not a tokenizer"):
        read_tokenizer(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match='tokenizer = "no-such/tokenizer": the Hugging Face hub'):
        fetch_tokenizer("no-such/tokenizer")
