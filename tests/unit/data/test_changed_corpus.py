"""A corpus that changes under a run is found by its checksums."""

import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from switchtitan.data import (
    Corpus,
    TokenSequences,
    build_train_batches,
    corpus_files,
    open_prepared,
)
from switchtitan.data import corpus as corpus_module
from switchtitan.errors import CorpusError

CHANGES: dict[str, Callable[[Path], object]] = {
    "edited": lambda file: _edit(file),
    "replaced": lambda file: _replace(file),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 2),
    "deleted": lambda file: file.unlink(),
}
MESSAGE = r"train-00000\.bin: .*(does not match its checksum|cannot be read|bytes, expected).*"


def _edit(file: Path) -> None:
    """Changes one byte and restores the time of modification."""
    before = file.stat()
    with file.open("r+b") as stream:
        first = stream.read(1)[0]
        stream.seek(0)
        stream.write(bytes([first ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _replace(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    other = file.with_name("other")
    other.write_bytes(data)
    other.replace(file)


@pytest.fixture
def copy(corpus: Corpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus.folder, tmp_path / "copy"))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any corpus is too large to be read on every start."""
    monkeypatch.setattr(corpus_module, "VERIFIED_BYTES", 0)


@pytest.fixture
def num_verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files whose checksums are computed."""
    names: list[str] = []
    compute = corpus_files.sha256_of_file

    def note(file: Path, on_bytes: Callable[[int], object]) -> str:
        names.append(file.name)
        return compute(file, on_bytes)

    monkeypatch.setattr(corpus_files, "sha256_of_file", note)
    return names


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("large")
def test_a_change_of_a_large_corpus_between_two_starts_is_found(copy: Path, change: str) -> None:
    open_prepared(copy)
    CHANGES[change](copy / "train-00000.bin")
    with pytest.raises(CorpusError, match=MESSAGE):
        open_prepared(copy)


@pytest.mark.usefixtures("large")
def test_a_large_corpus_is_read_once(copy: Path, num_verified: list[str]) -> None:
    open_prepared(copy)
    assert sorted(num_verified) == ["tokenizer.json", "train-00000.bin", "validation-00000.bin"]
    num_verified.clear()
    open_prepared(copy)
    assert num_verified == []
    os.utime(copy / "train-00000.bin")
    open_prepared(copy)
    assert num_verified == ["train-00000.bin"]


@pytest.mark.parametrize("contents", ["", "[]", '{"files": {"train-00000.bin": [1]}}'])
@pytest.mark.usefixtures("large")
def test_a_damaged_record_of_what_was_verified_means_to_verify(
    copy: Path, num_verified: list[str], contents: str
) -> None:
    (copy / "verified.json").write_text(contents)
    open_prepared(copy)
    assert len(num_verified) == 3


@pytest.mark.usefixtures("large")
def test_a_folder_that_cannot_be_written_is_verified_on_every_start(
    copy: Path, num_verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, contents: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(corpus_files, "write_atomically", refuse)
    for _ in range(2):
        num_verified.clear()
        open_prepared(copy)
        assert len(num_verified) == 3


def sequences_of(folder: Path) -> TokenSequences:
    return open_prepared(folder).split("train", 16)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_a_run_is_found_before_its_tokens_are_used(
    copy: Path, change: str, num_workers: int
) -> None:
    batches = build_train_batches(
        sequences_of(copy),
        seed=1,
        global_batch_size=2,
        local_batch_size=2,
        rank=0,
        num_ranks=1,
        num_workers=num_workers,
    )
    next(batches)
    CHANGES[change](copy / "train-00000.bin")
    with pytest.raises(CorpusError, match=rf"^{copy}/{MESSAGE}") as raised:
        list(islice(batches, 20))  # a worker has read some ahead
    assert "Traceback" not in str(raised.value)
    batches.close()


def test_another_copy_of_the_same_tokens_is_no_change(copy: Path) -> None:
    sequences = sequences_of(copy)
    expected = sequences[0].tokens
    file = copy / "train-00000.bin"
    shutil.copyfile(file, copy / "again")
    (copy / "again").replace(file)
    assert sequences[0].tokens.equal(expected)
    file.chmod(0o600)
    assert sequences[0].tokens.equal(expected)
    sequences.check_unchanged()


def test_a_token_outside_of_the_vocabulary_is_an_error(copy: Path) -> None:
    opened = open_prepared(copy)
    files = [copy / shard.file for shard in opened.index.splits["train"]]
    counts = [shard.tokens for shard in opened.index.splits["train"]]
    sequences = TokenSequences(
        files, counts, dtype="uint16", seq_len=16, eos_id=0, vocab_size=opened.vocab_size - 1
    )
    with pytest.raises(CorpusError, match=r"train-00000\.bin: the shard holds the token 299, but"):
        [sequences[index] for index in range(len(sequences))]
