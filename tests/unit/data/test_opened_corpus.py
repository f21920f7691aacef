"""A prepared corpus is opened whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from switchtitan.data import corpus as corpus_module
from switchtitan.data import open_prepared
from switchtitan.data.corpus import fingerprint_of, verify_files
from switchtitan.errors import CorpusError


def edit(file):
    contents = bytearray(file.read_bytes())
    contents[0] ^= 1
    file.write_bytes(contents)


CHANGES = {
    "edited": edit,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 2),
    "deleted": Path.unlink,
}


def test_the_fingerprint_covers_tokens_and_tokenizer_and_not_the_place(corpus, copy):
    assert open_prepared(copy).fingerprint == corpus.fingerprint
    index = corpus.index
    same = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
    assert same == corpus.fingerprint
    assert fingerprint_of("0" * 64, index.dtype, index.splits) != same
    assert fingerprint_of(index.tokenizer.sha256, "uint32", index.splits) != same
    others = index.splits | {"train": index.splits["validation"]}
    assert fingerprint_of(index.tokenizer.sha256, index.dtype, others) != same


@pytest.mark.parametrize("name", ["train-00000.bin", "tokenizer.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_file_is_named_with_the_fix(copy, name, change):
    CHANGES[change](copy / name)
    with pytest.raises(CorpusError, match=f"{name}: .*; delete the folder {copy}"):
        open_prepared(copy)


@pytest.mark.parametrize("change", CHANGES)
def test_sizes_of_a_large_corpus_are_compared_at_each_start(copy, change, monkeypatch):
    monkeypatch.setattr(corpus_module, "VERIFIED_BYTES", 0)
    CHANGES[change](copy / "train-00000.bin")
    if change == "edited":
        opened = open_prepared(copy)
        with pytest.raises(CorpusError, match=r"train-00000\.bin: .* checksum"):
            verify_files(copy, opened.index)
    else:
        with pytest.raises(CorpusError, match=r"train-00000\.bin: it (has .* bytes|cannot be)"):
            open_prepared(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: json.dumps({**json.loads(text), "format_version": 99}),
        lambda text: json.dumps({**json.loads(text), "dtype": "uint32"}),
        # A number that neither the fingerprint nor another file holds.
        lambda text: text.replace('"eos_id": 0', '"eos_id": 1'),
    ],
)
def test_a_damaged_index_is_named_with_the_fix(copy, change):
    file = copy / "index.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(CorpusError, match=r"index\.json: the index .*delete the folder"):
        open_prepared(copy)


def test_what_does_not_fit_a_model_is_refused(corpus):
    with pytest.raises(CorpusError, match=r"seq_len = 9999.*validation_fraction"):
        corpus.split("validation", 9999)
    corpus.check_vocabulary(corpus.vocab_size)
    with pytest.raises(CorpusError, match=rf"{corpus.vocab_size} tokens.*\[model\] vocab_size"):
        corpus.check_vocabulary(corpus.vocab_size - 1)
