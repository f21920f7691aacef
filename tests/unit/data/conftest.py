"""A tiny corpus, prepared once for all read-only tests."""

import shutil
from pathlib import Path

import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data.config import DataConfig
from switchtitan.data.prepare import open_corpus


@pytest.fixture(scope="session")
def documents():
    return make_documents(120)


@pytest.fixture(scope="session")
def jsonl_config(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("jsonl")
    write_json_lines(folder / "a.jsonl", documents[:50])
    write_json_lines(folder / "b" / "c.jsonl", documents[50:])
    return DataConfig(
        dataset="jsonl",
        path=folder,
        vocab_size=300,
        validation_fraction=0.1,
        cache_dir=tmp_path_factory.mktemp("corpora"),
    )


@pytest.fixture(scope="session")
def corpus(jsonl_config):
    return open_corpus(jsonl_config)


@pytest.fixture
def copy(corpus, tmp_path):
    """A folder with the corpus, to damage."""
    return Path(shutil.copytree(corpus.folder, tmp_path / corpus.index.name))


@pytest.fixture
def elsewhere(jsonl_config, tmp_path):
    """The configuration of the corpus, which is not prepared there."""
    return jsonl_config.model_copy(update={"cache_dir": tmp_path / "elsewhere"})
