"""Any dataset of the hub, on local folders of the same layout."""

import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.cli.prepare import summary
from switchtitan.data import DATASETS, Corpus, DataConfig, open_corpus
from switchtitan.data import corpus_plan as plan_module
from switchtitan.data import prepare as prepare_module
from switchtitan.data import segments as segments_module
from switchtitan.data.sources import HubDataset, Source, SourceKeys, TokenizedSource
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


class FakeHub:
    """The commits of a dataset: their folders, the newest one last."""

    def __init__(self) -> None:
        self.commits: dict[str, Path] = {}

    def folder(self, revision: str | None) -> str:
        return str(self.commits[revision or list(self.commits)[-1]])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with one commit of `owner/name`, whose train split has two files."""
    hub, load, names = FakeHub(), datasets.load_dataset, datasets.get_dataset_split_names

    def load_dataset(name: str, *args: object, revision: str | None, **keys: object) -> object:
        assert name in ("owner/name", "allenai/c4")
        return load(hub.folder(revision), *args, **keys)

    def get_names(name: str, config: str | None, revision: str | None) -> object:
        return names(hub.folder(revision), config)

    def dataset_info(client: object, name: str) -> SimpleNamespace:
        assert name in ("owner/name", "allenai/c4")
        return SimpleNamespace(sha=list(hub.commits)[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "hub_error", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", get_names)
    return hub


def commit(hub: FakeHub, tmp_path: Path, revision: str, texts: list[str]) -> None:
    """Adds a commit in the layout of C4, which any dataset may have."""
    folder = tmp_path / f"commit-{revision}"
    for split, part in (("train", texts), ("validation", texts[:5])):
        write_json_lines(folder / "en" / f"c4-{split}.00000-of-00001.json.gz", part)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: en/c4-train*}\n  - {split: validation, path: en/c4-val*}\n---\n"
    )
    hub.commits[revision] = folder


def decoded(corpus: Corpus) -> list[str]:
    sequences = corpus.split("train", 1)
    text = corpus.tokenizer().tokenizer.decode(
        sequences.read(0, sequences.num_tokens).tolist(), skip_special_tokens=False
    )
    return text.split("<|endoftext|>")[:-1]


@pytest.mark.parametrize("dataset", ["hub", "c4"])
def test_a_resumed_preparation_reads_the_commit_it_began_with(
    dataset: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_documents(60, seed=4), make_documents(60, seed=5)
    commit(hub, tmp_path, "1111aaaa", old)
    keys: dict[str, object] = {"dataset": dataset, "vocab_size": 280}
    if dataset == "hub":
        keys["path"] = "owner/name"
    config = DataConfig.model_validate({**keys, "cache_dir": tmp_path / "corpora"})
    name = plan_module.plan_corpus(config).folder.name
    monkeypatch.setattr(segments_module, "SAVE_TOKENS", 300)
    monkeypatch.setattr(segments_module, "_BATCH_DOCUMENTS", 3)
    write, num_writes = prepare_module._Preparation._write_progress, 0

    def stop_after_four(self: object, progress: segments_module.Progress) -> None:
        nonlocal num_writes
        write(self, progress)  # type: ignore[arg-type]
        num_writes += 1
        if num_writes == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module._Preparation, "_write_progress", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            open_corpus(config, show_progress=False)
    commit(hub, tmp_path, "2222bbbb", new)
    corpus = open_corpus(config, show_progress=False)
    assert corpus.index.revision == "1111aaaa"
    assert decoded(corpus) == old
    # The name does not depend on the commit, so earlier corpora are found.
    assert corpus.folder.name == name
    assert "revision" not in corpus.index.identity
    # Negative control: a preparation that begins now reads the newest commit.
    other = DataConfig.model_validate({**keys, "cache_dir": tmp_path / "others"})
    corpus = open_corpus(other, show_progress=False)
    assert corpus.index.revision == "2222bbbb"
    assert decoded(corpus) == new
    assert corpus.folder.name == name
    assert "revision     2222bbbb" in summary(corpus)


def test_a_local_copy_has_no_commit(folder: Path, tmp_path: Path) -> None:
    source = make_source(folder)
    assert isinstance(source, HubDataset)
    assert source.newest_revision() is None


def test_a_hub_that_does_not_name_the_commit_is_an_error(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(client: object, name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    keys = {"dataset": "hub", "path": "owner/name", "cache_dir": tmp_path / "corpora"}
    with pytest.raises(CorpusError, match=r"path = 'owner/name': cannot be opened .*no route"):
        open_corpus(DataConfig.model_validate(keys), show_progress=False)
