"""Any dataset of the hub, on local folders of the same layout."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.tiny_documents import make_documents

from switchtitan.data import DATASETS, DataConfig, open_corpus
from switchtitan.data import corpus_plan as plan_module
from switchtitan.data.sources import Source, SourceKeys, TokenizedSource
from switchtitan.errors import CorpusError

TRAIN, VALIDATION = make_documents(40, seed=2), make_documents(11, seed=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository of a dataset with two configurations, of which one has a validation split."""
    folder = tmp_path / "owner" / "name"
    for config, split, number, texts in (
        ("en", "train", 0, TRAIN[:15]),
        ("en", "train", 1, TRAIN[15:]),
        ("en", "validation", 0, VALIDATION),
        ("de", "train", 0, TRAIN[:5]),
    ):
        file = folder / config / f"{split}-{number:05d}-of-00002.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"id": texts, "body": texts}), file)
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: en\n  data_files:\n"
        "  - {split: train, path: en/train-*}\n  - {split: validation, path: en/validation-*}\n"
        "- config_name: de\n  data_files:\n  - {split: train, path: de/train-*}\n---\n"
    )
    return folder


def make_source(
    folder: Path, column: str = "body", config: str | None = "en", split: str | None = None
) -> Source:
    source = DATASETS["hub"].open(SourceKeys(folder, column, config, split))
    assert not isinstance(source, TokenizedSource)
    return source


def test_the_splits_of_a_configuration_are_streamed(folder: Path) -> None:
    source = make_source(folder)
    assert source.splits == ("train", "validation")
    assert list(source.open("train")) == TRAIN
    assert list(source.open("validation")) == VALIDATION


def test_one_split_can_be_read_alone(folder: Path) -> None:
    source = make_source(folder, split="validation")
    assert source.splits == ()
    assert list(source.open(None)) == VALIDATION


def test_a_dataset_without_a_validation_split_has_no_own_splits(folder: Path) -> None:
    source = make_source(folder, config="de")
    assert source.splits == ()
    assert list(source.open(None)) == TRAIN[:5]


@pytest.mark.parametrize("taken", [1, 15, 22])
def test_a_stream_resumes_at_its_position(folder: Path, taken: int) -> None:
    source = make_source(folder)
    stream = source.open("train")
    for _ in range(taken):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    assert list(source.open("train", position)) == TRAIN[taken:]


def test_it_is_prepared_with_its_own_splits(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(
        dataset="hub",
        path=folder,
        hub_config="en",
        text_column="body",
        vocab_size=280,
        cache_dir=tmp_path / "corpora",
    )
    corpus = open_corpus(config, show_progress=False)
    assert corpus.index.num_documents("train") == 40
    assert corpus.index.num_documents("validation") == 11


def test_a_column_that_is_not_there_is_named(folder: Path) -> None:
    record = next(make_source(folder, column="text").open("train"))
    assert not isinstance(record, str)
    assert "column 'text', found body, id" in record.what


@pytest.mark.parametrize(
    ("config", "split"), [("fr", None), ("en", "tset")], ids=["configuration", "split"]
)
def test_a_configuration_or_split_that_is_not_there_is_an_error(
    folder: Path, config: str, split: str | None
) -> None:
    source = make_source(folder, config=config, split=split)
    with pytest.raises(CorpusError, match=f"{split or config}.*hub_config"):
        source.open(source.splits[0] if source.splits else None)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "hub_error", lambda: "no route")


@pytest.mark.usefixtures("unreachable")
def test_an_unreachable_hub_is_an_error_or_means_the_offline_dataset(tmp_path: Path) -> None:
    keys = {"dataset": "hub", "path": "owner/unknown", "cache_dir": tmp_path, "vocab_size": 300}
    with pytest.raises(CorpusError, match=r"dataset = 'hub'.*cannot be reached \(no route\)"):
        open_corpus(DataConfig.model_validate(keys), show_progress=False)
    offline = DataConfig.model_validate(
        {**keys, "offline_dataset": "pystdlib", "max_bytes": 300_000}
    )
    corpus = open_corpus(offline, show_progress=False)
    assert "standard library" in corpus.description
    assert "owner/unknown" in str(corpus.fallback_for)
