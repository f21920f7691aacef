import json
from pathlib import Path

import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DATASETS, DataConfig, open_corpus
from switchtitan.data.sources import SourceKeys
from switchtitan.errors import CorpusError

TRAIN, VALIDATION = make_documents(40, seed=2), make_documents(11, seed=3)


@pytest.fixture
def c4_copy(tmp_path: Path) -> Path:
    folder = tmp_path / "c4"
    write_json_lines(folder / "en" / "c4-train.00000-of-00002.json.gz", TRAIN[:15])
    write_json_lines(folder / "en" / "c4-train.00001-of-00002.json.gz", TRAIN[15:])
    write_json_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", VALIDATION)
    return folder


def test_a_copy_of_the_hubs_files_is_streamed_in_its_own_splits(c4_copy: Path) -> None:
    source = DATASETS["c4"].open(SourceKeys(c4_copy))
    assert list(source.open("train")) == TRAIN
    assert list(source.open("validation")) == VALIDATION


@pytest.mark.parametrize("taken", [1, 15, 22])
def test_a_stream_resumes_at_its_position(c4_copy: Path, taken: int) -> None:
    source = DATASETS["c4"].open(SourceKeys(c4_copy))
    stream = source.open("train")
    for _ in range(taken):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    assert list(source.open("train", position)) == TRAIN[taken:]


def test_the_prepared_corpus_keeps_the_splits(c4_copy: Path, tmp_path: Path) -> None:
    config = DataConfig(
        dataset="c4", path=c4_copy, vocab_size=280, cache_dir=tmp_path / "corpora", max_documents=30
    )
    corpus = open_corpus(config, show_progress=False)
    assert corpus.index.num_documents("train") == 30
    assert corpus.index.num_documents("validation") == 11
    tokenizer = corpus.tokenizer().tokenizer
    tokens = [
        int(token) for sequence in corpus.split("validation", 1) for token in sequence.tokens[:1]
    ]
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.split("<|endoftext|>")[:10] == VALIDATION[:10]


def test_a_folder_without_the_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no files en/c4-train\.\*\.json\.gz"):
        DATASETS["c4"].open(SourceKeys(tmp_path))


def test_a_damaged_file_is_an_error(c4_copy: Path) -> None:
    (c4_copy / "en" / "c4-train.00001-of-00002.json.gz").write_bytes(b"no gzip")
    with pytest.raises(CorpusError, match="reading failed"):
        list(DATASETS["c4"].open(SourceKeys(c4_copy)).open("train"))
