"""The corpus of a run is found by its content, wherever it is now."""

import json
import shutil

import pytest

from switchtitan.data.corpus import Corpus, join_sources
from switchtitan.data.prepare import open_corpus
from switchtitan.data.recorded import find_recorded, record
from switchtitan.data.sequences import Schedule
from switchtitan.errors import CorpusError


@pytest.fixture
def other(elsewhere):
    """Another corpus, in a folder of its own."""
    return open_corpus(elsewhere.model_copy(update={"max_documents": 60}))


def test_a_corpus_is_found_under_another_name_and_one_of_the_same_name_is_not_it(
    copy, corpus, other, tmp_path
):
    run = json.loads(json.dumps(record(Corpus(copy, corpus.index))))
    assert find_recorded(run, tmp_path / "nowhere", tmp_path).folder == copy
    cache = tmp_path / "cache"
    shutil.copytree(other.folder, cache / copy.name)
    shutil.move(copy, cache / "renamed")
    shutil.copytree(other.folder, copy)
    found = find_recorded(run, cache, tmp_path)
    assert (found.folder, found.fingerprint) == (cache / "renamed", corpus.fingerprint)
    shutil.rmtree(cache / "renamed")
    (cache / "unrelated").mkdir()
    (cache / "unrelated" / "index.json").write_text("junk")
    with pytest.raises(CorpusError, match=f"{corpus.fingerprint}.*switchtitan prepare"):
        find_recorded(run, cache, tmp_path / "checkpoints" / "step-000000001")


def test_a_mixture_has_its_sources_and_shares_again(corpus, other, tmp_path):
    mixture = join_sources([other, corpus], Schedule((3000, 7000)))
    found = find_recorded(json.loads(json.dumps(record(mixture))), tmp_path, tmp_path)
    assert found.fingerprint == mixture.fingerprint
    assert found.description == mixture.description


@pytest.mark.parametrize("sources", [None, [], [{"folder": "corpora/x"}], [{"folder": 3}]])
def test_a_damaged_record_is_named(tmp_path, sources):
    with pytest.raises(CorpusError, match="names no corpus"):
        find_recorded({"sources": sources}, tmp_path, tmp_path)
