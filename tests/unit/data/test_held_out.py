"""Held-out splits without a document that has a large share."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.preparation import read_split
from support.tiny_documents import write_json_lines

from switchtitan.data import Corpus, DataConfig, open_corpus, open_prepared, plan_corpus
from switchtitan.data.corpus_files import INDEX_FILE
from switchtitan.data.held_out import document_cap, is_held_out

SHARE = 0.02


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """1100 documents, of which the validation split has 110 and the test split about as many; each
    seventh has 150 times the words of the others."""
    folder = tmp_path_factory.mktemp("uneven")
    texts = [
        " ".join(f"w{number}" for _ in range(300 if number % 7 == 0 else 2))
        for number in range(1100)
    ]
    write_json_lines(folder / "texts" / "a.jsonl", texts)
    return DataConfig(
        dataset="jsonl",
        path=folder / "texts",
        vocab_size=300,
        validation_fraction=0.1,
        test_fraction=0.1,
        cache_dir=folder / "corpora",
    )


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> Corpus:
    return open_corpus(config, show_progress=False)


@pytest.fixture(scope="module")
def uncut(config: DataConfig) -> Corpus:
    every = config.model_copy(update={"max_document_share": None})
    return open_corpus(every, show_progress=False)


def lengths(corpus: Corpus, split: str) -> list[int]:
    tokenizer = corpus.tokenizer()
    return [len(ids) + 1 for ids in tokenizer.encode_documents(read_split(corpus, split))]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_document_has_more_than_its_share(corpus: Corpus, uncut: Corpus, split: str) -> None:
    assert max(lengths(uncut, split)) > SHARE * sum(lengths(uncut, split))  # it would without a cap
    kept = lengths(corpus, split)
    assert sum(kept) == corpus.index.num_tokens(split)
    assert max(kept) <= SHARE * sum(kept)
    assert max(kept) == corpus.index.document_caps[split]


def test_cut_documents_keep_their_beginning_and_training_documents_all(
    corpus: Corpus, uncut: Corpus
) -> None:
    assert read_split(corpus, "train") == read_split(uncut, "train")
    for split in ("validation", "test"):
        pairs = list(zip(read_split(corpus, split), read_split(uncut, split), strict=True))
        assert all(before.startswith(after) for after, before in pairs)
        assert 0 < sum(after != before for after, before in pairs) < len(pairs)
        assert corpus.index.splits[split][0].bytes_of_text == sum(
            len(after.encode()) for after, _ in pairs
        )


def test_a_corpus_of_an_earlier_version_is_found_without_the_key(
    config: DataConfig, uncut: Corpus, corpus: Corpus
) -> None:
    """The folder's name then holds what it held before the key existed."""
    assert "max_document_share" not in uncut.index.identity
    assert "document_caps" not in json.loads((uncut.folder / INDEX_FILE).read_text())
    assert open_prepared(uncut.folder).fingerprint == uncut.fingerprint != corpus.fingerprint
    assert plan_corpus(config).folder == corpus.folder != uncut.folder


def test_another_share_is_another_corpus(config: DataConfig) -> None:
    other = config.model_copy(update={"max_document_share": 0.05})
    assert plan_corpus(other).folder != plan_corpus(config).folder


def test_a_preparation_killed_before_the_rename_finishes_with_the_same_fingerprint(
    config: DataConfig, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    elsewhere = config.model_copy(update={"cache_dir": tmp_path})
    monkeypatch.setattr("switchtitan.data.prepare.os.rename", stop)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(elsewhere, show_progress=False)
    monkeypatch.undo()
    again = open_corpus(elsewhere, show_progress=False)
    assert again.fingerprint == corpus.fingerprint
    assert sorted(file.name for file in again.folder.iterdir()) == [
        "index.json",
        "index.json.sha256",
        "test-cut.bin",
        "tokenizer.json",
        "train-00000.bin",
        "validation-cut.bin",
    ]


@given(st.lists(st.integers(2, 100_000), min_size=1, max_size=300), st.floats(0.005, 0.5))
def test_the_cap_is_the_largest_that_keeps_the_share(lengths: list[int], share: float) -> None:
    allowed = max(share, 2 / len(lengths))
    cap = document_cap(np.array(lengths), share)

    def kept(limit: int) -> int:
        return sum(min(length, limit) for length in lengths)

    assert cap == max(lengths) or cap + 1 > allowed * kept(cap + 1) * (1 - 1e-9)
    assert cap <= 2 or cap <= allowed * kept(cap) * (1 + 1e-9)


def test_few_documents_are_not_cut_to_nothing() -> None:
    assert document_cap(np.array([70, 9000]), SHARE) == 9000
    assert document_cap(np.array([10, 10, 10, 1000]), SHARE) == 30


def test_held_out_documents_are_the_requested_fraction_spread_over_the_corpus() -> None:
    held_out = [number for number in range(1000) if is_held_out(number, 20)]
    assert held_out[0] == 0
    assert len(held_out) == 50
    assert [number // 20 for number in held_out] == list(range(50))
    assert len({number % 20 for number in held_out}) > 10
