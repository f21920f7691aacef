"""A tiny corpus, prepared once for all read-only tests."""

from pathlib import Path

import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import Corpus, DataConfig, open_corpus


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(120)


@pytest.fixture(scope="session")
def jsonl_folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("jsonl")
    write_json_lines(folder / "a.jsonl", documents[:50])
    write_json_lines(folder / "b" / "c.jsonl", documents[50:])
    return folder


@pytest.fixture(scope="session")
def jsonl_config(jsonl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        dataset="jsonl",
        path=jsonl_folder,
        vocab_size=300,
        validation_fraction=0.1,
        max_document_share=None,
        cache_dir=tmp_path_factory.mktemp("corpora"),
    )


@pytest.fixture(scope="session")
def corpus(jsonl_config: DataConfig) -> Corpus:
    return open_corpus(jsonl_config, show_progress=False)
