"""A prepared corpus is opened whole or not at all, and is found if it changes during a run."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import pytest

from switchtitan.data import TokenSequences, build_train_batches, corpus_files, open_prepared
from switchtitan.data import corpus as corpus_module
from switchtitan.data.corpus_files import fingerprint_of
from switchtitan.errors import CorpusError


def edit(file):
    """Changes one byte and restores the time of modification."""
    before = file.stat()
    contents = bytearray(file.read_bytes())
    contents[0] ^= 1
    file.write_bytes(contents)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(file):
    other = shutil.copyfile(file, file.with_name("other"))
    edit(other)
    other.replace(file)


CHANGES = {
    "edited": edit,
    "replaced": replace,
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 2),
    "deleted": Path.unlink,
}


@pytest.fixture
def large(monkeypatch):
    """Any corpus is too large to be read on every start."""
    monkeypatch.setattr(corpus_module, "VERIFIED_BYTES", 0)


@pytest.fixture
def verified(monkeypatch):
    """The names of all files whose checksums are computed."""
    names, compute = [], corpus_files.sha256_of_file

    def note(file, on_bytes):
        names.append(file.name)
        return compute(file, on_bytes)

    monkeypatch.setattr(corpus_files, "sha256_of_file", note)
    return names


def test_the_fingerprint_covers_tokens_and_tokenizer_and_not_the_place(corpus, copy):
    assert open_prepared(copy).fingerprint == corpus.fingerprint
    index = corpus.index
    same = fingerprint_of(index.tokenizer.sha256, index.dtype, index.splits)
    assert same == corpus.fingerprint
    assert fingerprint_of("0" * 64, index.dtype, index.splits) != same
    assert fingerprint_of(index.tokenizer.sha256, "uint32", index.splits) != same
    others = index.splits | {"train": index.splits["validation"]}
    assert fingerprint_of(index.tokenizer.sha256, index.dtype, others) != same


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "tokenizer.json"])
@pytest.mark.parametrize("change", ["edited", "truncated", "deleted"])
def test_a_damaged_file_is_named_with_the_fix(copy, name, change):
    CHANGES[change](copy / name)
    with pytest.raises(CorpusError, match=f"{name}: .*; delete the folder {copy}"):
        open_prepared(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "[]",
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


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("large")
def test_a_change_of_a_large_corpus_between_two_starts_is_found(copy, change):
    open_prepared(copy)
    CHANGES[change](copy / "train-00000.bin")
    with pytest.raises(CorpusError, match=r"train-00000\.bin: "):
        open_prepared(copy)


@pytest.mark.usefixtures("large")
def test_a_large_corpus_is_read_once(copy, verified):
    open_prepared(copy)
    assert sorted(verified) == ["tokenizer.json", "train-00000.bin", "validation-00000.bin"]
    verified.clear()
    open_prepared(copy)
    assert verified == []
    os.utime(copy / "train-00000.bin")
    open_prepared(copy)
    assert verified == ["train-00000.bin"]
    # A damaged record of what was verified means to verify.
    (copy / "verified.json").write_text('{"files": {"train-00000.bin": [1]}}')
    verified.clear()
    open_prepared(copy)
    assert len(verified) == 3


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_run_is_found_before_its_tokens_are_used(copy, change):
    keys = {"global_batch_size": 2, "local_batch_size": 2, "rank": 0, "num_ranks": 1}
    batches = build_train_batches(open_prepared(copy).split("train", 16), seed=1, **keys)
    next(batches)
    CHANGES[change](copy / "train-00000.bin")
    with pytest.raises(CorpusError, match=rf"^{copy}/train-00000\.bin: "):
        list(islice(batches, 20))
    batches.close()


def test_another_copy_of_the_same_tokens_is_no_change(copy):
    sequences = open_prepared(copy).split("train", 16)
    expected = sequences[0].tokens
    file = copy / "train-00000.bin"
    shutil.copyfile(file, copy / "again").replace(file)
    assert sequences[0].tokens.equal(expected)
    sequences.check_unchanged()


def test_a_token_outside_of_the_vocabulary_is_an_error(copy):
    opened = open_prepared(copy)
    files = [copy / shard.file for shard in opened.index.splits["train"]]
    counts = [shard.tokens for shard in opened.index.splits["train"]]
    settings = {"dtype": "uint16", "seq_len": 16, "eos_id": 0}
    sequences = TokenSequences(files, counts, **settings, vocab_size=opened.vocab_size - 1)
    with pytest.raises(CorpusError, match=r"train-00000\.bin: .*token 299"):
        [sequences[index] for index in range(len(sequences))]
