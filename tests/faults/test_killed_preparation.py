"""A killed preparation of a corpus resumes, and two processes prepare a corpus once."""

import signal

import pytest
from support.preparation import count_encoded, start_preparation, use_small_batches
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DataConfig, open_corpus, plan_corpus


@pytest.fixture
def config(tmp_path):
    write_json_lines(tmp_path / "in" / "a.jsonl", make_documents(120))
    keys = {"dataset": "jsonl", "path": tmp_path / "in", "vocab_size": 300}
    return DataConfig(**keys, validation_fraction=0.1, cache_dir=tmp_path / "corpora")


def test_a_killed_preparation_resumes_after_its_last_segment(config, tmp_path, monkeypatch):
    killed = start_preparation(config, stop_after=5)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    folder = plan_corpus(config).folder
    assert not folder.exists()
    (unfinished,) = folder.parent.glob("*.partial")
    assert len(list(unfinished.glob("train-*.bin"))) == 4  # the fourth is written but not recorded
    use_small_batches(monkeypatch)
    with monkeypatch.context() as patched:
        encoded = count_encoded(patched)
        went_on = open_corpus(config)
    shards = [shard for split in went_on.index.splits.values() for shard in split]
    finished = sum(shard.documents for shard in shards if shard.file[-9:] < "00003.bin")
    assert 0 < sum(encoded) == 120 - finished
    assert not unfinished.exists()
    straight = config.model_copy(update={"cache_dir": tmp_path / "straight"})
    expected = open_corpus(straight)
    assert went_on.index == expected.index


def test_two_processes_prepare_one_corpus_once(config):
    both = [start_preparation(config) for _ in range(2)]
    results = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] != ""
    found = sorted(path.name.split("-")[0] + path.suffix for path in config.cache_dir.iterdir())
    assert found == ["jsonl", "jsonl.lock"]
