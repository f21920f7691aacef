import os
from pathlib import Path

import pytest
from support.preparation import read_split, run_alone
from support.tiny_documents import write_json_lines
from support.word_tokenizer import save_tokenizer

from switchtitan.data import (
    Corpus,
    DataConfig,
    open_corpus,
    open_prepared,
    plan_corpus,
    prepare_corpus,
)
from switchtitan.data import segments as segments_module
from switchtitan.data.held_out import is_held_out
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.errors import CorpusError


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "_BATCH_DOCUMENTS", 8)


def test_each_document_decodes_from_exactly_one_split(corpus: Corpus, documents: list[str]) -> None:
    held_out = [document for number, document in enumerate(documents) if is_held_out(number, 10)]
    assert read_split(corpus, "validation") == held_out
    assert read_split(corpus, "train") == [text for text in documents if text not in held_out]
    assert corpus.index.num_documents("train") == 108
    assert corpus.index.dtype == "uint16"


def test_the_test_split_is_disjoint_from_the_others(
    jsonl_config: DataConfig, documents: list[str]
) -> None:
    config = jsonl_config.model_copy(update={"test_fraction": 0.05})
    corpus = open_corpus(config, show_progress=False)
    assert corpus.folder != plan_corpus(jsonl_config).folder
    numbers = range(len(documents))
    validation = [number for number in numbers if is_held_out(number, 10)]
    test = [
        number
        for number in numbers
        if is_held_out(number, 20, first=1) and number not in validation
    ]
    # One document in 20, less those in the validation split.
    assert 4 <= len(test) <= 6
    assert read_split(corpus, "validation") == [documents[number] for number in validation]
    assert read_split(corpus, "test") == [documents[number] for number in test]
    assert read_split(corpus, "train") == [
        documents[number] for number in numbers if number not in validation + test
    ]


def test_a_missing_test_split_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(
        CorpusError, match=r"no test split, only train, validation.*\[data\] test_fraction"
    ):
        corpus.split("test", 16)


@pytest.mark.usefixtures("small_batches")
def test_segments_change_the_files_but_not_the_tokens(
    jsonl_config: DataConfig, tmp_path: Path, corpus: Corpus
) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    other = open_prepared(prepare_corpus(config, show_progress=False, segment_tokens=500))
    assert len(other.index.splits["train"]) > 3
    assert read_split(other, "train") == read_split(corpus, "train")
    assert read_split(other, "validation") == read_split(corpus, "validation")


@pytest.mark.usefixtures("small_batches")
def test_a_killed_preparation_resumes_after_its_last_segment(
    jsonl_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path / "killed"})
    killed = run_alone(config, stop_after=4)
    assert killed.wait(60) == -9
    folder = plan_corpus(config).folder
    assert not folder.exists()
    (unfinished,) = folder.parent.glob("*.partial")
    assert len(list(unfinished.glob("train-*.bin"))) == 4  # the fourth is written but not recorded

    encoded: list[str] = []
    encode = DocumentTokenizer.encode_documents

    def count_and_encode(self: DocumentTokenizer, documents: list[str]) -> list[list[int]]:
        encoded.extend(documents)
        return encode(self, documents)

    monkeypatch.setattr(DocumentTokenizer, "encode_documents", count_and_encode)
    went_on = open_prepared(prepare_corpus(config, show_progress=False, segment_tokens=500))
    finished = sum(
        shard.documents
        for shards in went_on.index.splits.values()
        for shard in shards
        if shard.file[-9:] < "00003.bin"
    )
    assert 0 < len(encoded) == 120 - finished
    assert not unfinished.exists()

    straight = config.model_copy(update={"cache_dir": tmp_path / "straight"})
    expected = open_prepared(prepare_corpus(straight, show_progress=False, segment_tokens=500))
    assert went_on.index == expected.index


@pytest.mark.parametrize("num_batches", [1, 4, 9, 14])
@pytest.mark.usefixtures("small_batches")
def test_a_stop_within_a_segment_costs_little_and_changes_nothing(
    num_batches: int,
    jsonl_config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    corpus: Corpus,
) -> None:
    """All is one segment; it is stopped before batch `num_batches` of 15 is tokenized."""
    monkeypatch.setattr(segments_module, "SAVE_TOKENS", 300)
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    encoded: list[int] = []
    encode = DocumentTokenizer.encode_documents

    def encode_or_stop(self: DocumentTokenizer, documents: list[str]) -> list[list[int]]:
        if len(encoded) == num_batches:
            raise KeyboardInterrupt
        encoded.append(len(documents))
        return encode(self, documents)

    monkeypatch.setattr(DocumentTokenizer, "encode_documents", encode_or_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, show_progress=False)
    (unfinished,) = tmp_path.glob("*.partial")
    # Written after the last flush, or what a crash left in its place.
    for file in unfinished.glob("*-00000.bin"):
        with file.open("ab") as stream:
            stream.write(b"garbage")
    encoded.clear()
    monkeypatch.setattr(DocumentTokenizer, "encode_documents", encode)
    num_encoded = []

    def encode_and_count(self: DocumentTokenizer, documents: list[str]) -> list[list[int]]:
        num_encoded.append(len(documents))
        return encode(self, documents)

    monkeypatch.setattr(DocumentTokenizer, "encode_documents", encode_and_count)
    resumed = open_prepared(prepare_corpus(config, show_progress=False))
    assert resumed.index == corpus.index
    assert sum(num_encoded) <= 120 - 8 * max(0, num_batches - 4)


@pytest.mark.usefixtures("small_batches")
def test_progress_without_its_files_is_not_trusted(
    jsonl_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Corpus
) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    monkeypatch.setattr("switchtitan.data.prepare.os.rename", _stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, show_progress=False)
    monkeypatch.undo()
    (unfinished,) = tmp_path.glob("*.partial")
    (unfinished / "progress.json").write_text('{"segments": "many"}')
    assert open_corpus(config, show_progress=False).index == corpus.index


@pytest.mark.parametrize("lost", ["progress.json", "tokenizer.json", "train-00001.bin"])
@pytest.mark.usefixtures("small_batches")
def test_a_stop_before_the_rename_leaves_nothing_that_looks_complete(
    jsonl_config: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    corpus: Corpus,
) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    monkeypatch.setattr("switchtitan.data.prepare.os.rename", _stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, show_progress=False, segment_tokens=500)
    monkeypatch.undo()
    assert not plan_corpus(config).is_prepared
    (unfinished,) = tmp_path.glob("*.partial")
    (unfinished / lost).unlink()
    again = open_corpus(config, show_progress=False)
    assert again.index == corpus.index
    assert {file.name for file in again.folder.iterdir()} == {
        "index.json",
        "index.json.sha256",
        "tokenizer.json",
        "train-00000.bin",
        "validation-00000.bin",
    }


def _stop(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_prepare_one_corpus_once(jsonl_config: DataConfig, tmp_path: Path) -> None:
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    both = [run_alone(config) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    names = sorted(path.name.split("-")[0] + path.suffix for path in tmp_path.iterdir())
    assert names == ["jsonl", "jsonl.lock"]


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 301}, {"max_documents": 50}, {"max_bytes": 3000}, {"validation_fraction": 0.2}],
)
def test_what_determines_the_tokens_determines_the_folder(
    jsonl_config: DataConfig, change: dict[str, object]
) -> None:
    folder = plan_corpus(jsonl_config).folder
    assert plan_corpus(jsonl_config.model_copy(update=change)).folder != folder
    unrelated = {"seq_len": 99, "num_workers": 0}
    assert plan_corpus(jsonl_config.model_copy(update=unrelated)).folder == folder


def test_caps_limit_documents_and_bytes(
    jsonl_config: DataConfig, tmp_path: Path, documents: list[str]
) -> None:
    fewer = jsonl_config.model_copy(update={"cache_dir": tmp_path, "max_documents": 31})
    assert _num_documents(fewer) == 31
    sizes = [len(document.encode()) for document in documents]
    smaller = jsonl_config.model_copy(
        update={"cache_dir": tmp_path, "max_bytes": sum(sizes[:40]) + 1}
    )
    assert _num_documents(smaller) == 41


def _num_documents(config: DataConfig) -> int:
    index = open_corpus(config, show_progress=False).index
    return sum(index.num_documents(split) for split in index.splits)


def test_a_vocabulary_above_65536_needs_four_bytes_per_token(
    tmp_path: Path, jsonl_config: DataConfig
) -> None:
    file = save_tokenizer(tmp_path / "big" / "tokenizer.json", "</s>", ids_from=70_000)
    settings = {"cache_dir": tmp_path, "tokenizer": str(file), "vocab_size": None}
    corpus = open_corpus(jsonl_config.model_copy(update=settings), show_progress=False)
    assert corpus.index.dtype == "uint32"
    assert int(corpus.split("train", 9)[0].tokens.max()) >= 70_000


def test_empty_documents_and_lone_surrogates_are_harmless(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "", "t\ud800wo", "three", ""])
    config = DataConfig(
        dataset="jsonl", path=tmp_path / "in", vocab_size=257, cache_dir=tmp_path / "out"
    )
    corpus = open_corpus(config, show_progress=False)
    assert read_split(corpus, "validation") == ["one"]
    assert read_split(corpus, "train") == ["t?wo", "three"]


def test_a_corpus_of_one_document_is_refused(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", ["the only one"])
    config = DataConfig(dataset="jsonl", path=tmp_path, vocab_size=257, cache_dir=tmp_path / "out")
    with pytest.raises(
        CorpusError, match="no document for the train split; a corpus needs at least 2"
    ):
        prepare_corpus(config, show_progress=False)


def test_a_full_disk_is_a_clear_error(
    jsonl_config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(segments_module.ShardWriter, "write", no_space)
    config = jsonl_config.model_copy(update={"cache_dir": tmp_path})
    with pytest.raises(CorpusError, match=r"the disk is full .* are free.; free space"):
        prepare_corpus(config, show_progress=False)


def test_the_standard_library_can_be_prepared(tmp_path: Path) -> None:
    config = DataConfig(cache_dir=tmp_path, vocab_size=500, max_bytes=400_000)
    corpus = open_corpus(config, show_progress=False)
    assert "standard library of CPython 3." in corpus.description
    assert corpus.vocab_size == 500
    assert any("import " in text for text in read_split(corpus, "validation"))
    assert corpus.index.num_tokens("train") > 50_000
