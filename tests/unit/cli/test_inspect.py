"""`switchtitan inspect` shows what a corpus holds and what the model reads."""

import json
from pathlib import Path

import pytest
from support.smallest import SMALLEST
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.cli import inspect
from switchtitan.data import Corpus, DataConfig, build_train_batches, open_corpus

DOCUMENTS = make_documents(60)
SEQ_LEN = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("inspected")
    write_json_lines(folder / "in" / "a.jsonl", DOCUMENTS)
    config = DataConfig(
        dataset="jsonl", path=folder / "in", vocab_size=300, cache_dir=folder / "corpora"
    )
    return open_corpus(config, show_progress=False)


def inspected(corpus: Corpus, capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    inspect.main([str(corpus.folder), "--seq-len", str(SEQ_LEN), "--json", "-", *words])
    return json.loads(capsys.readouterr().out)


def test_sequences_are_shown_with_their_documents(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    result = inspected(corpus, capsys, "--num", "4")
    assert result["fingerprint"] == corpus.fingerprint
    pieces = [piece for sequence in result["sequences"] for piece in sequence["documents"]]
    tokens = [token for piece in pieces for token in piece["tokens"]]
    train = corpus.split("train", 4 * SEQ_LEN)
    assert tokens == train[0].tokens[:-1].tolist()
    assert pieces[0]["text"]
    assert DOCUMENTS[1].startswith(pieces[0]["text"])  # document 0 is held out
    for piece in pieces:
        assert piece["ends"] == (piece["tokens"][-1] == corpus.eos_id)
        assert "<|endoftext|>" not in piece["text"]
    assert any(piece["ends"] for piece in pieces)
    assert not all(piece["ends"] for piece in pieces)


def test_a_seed_shows_what_a_run_with_it_reads_first(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    result = inspected(corpus, capsys, "--seed", "7", "--num", "2")
    batches = build_train_batches(
        corpus.train_split(SEQ_LEN),
        seed=7,
        global_batch_size=2,
        local_batch_size=2,
        rank=0,
        num_ranks=1,
    )
    (batch,) = next(batches)
    batches.close()
    shown = [
        [token for piece in sequence["documents"] for token in piece["tokens"]]
        for sequence in result["sequences"]
    ]
    assert shown == batch.tokens.tolist()


def test_the_text_names_source_counts_and_ends(
    corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    inspect.main([str(corpus.folder), "--split", "validation", "--num", "1", "--seq-len", "9"])
    text = capsys.readouterr().out
    assert f"fingerprint  {corpus.fingerprint}" in text
    counts = corpus.index.num_tokens("validation"), corpus.index.num_documents("validation")
    assert "validation   {:,} tokens, {:,} documents".format(*counts) in text
    assert "documents end in <|endoftext|> (0)" in text
    assert "--- sequence 0 of" in text


def test_a_configuration_names_the_corpus(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    identity = corpus.folder.parent.parent / "in"
    file = tmp_path / "run.toml"
    file.write_text(
        SMALLEST.format(folder=tmp_path)
        + f"""
[data]
seq_len = 8
vocab_size = 300
cache_dir = "{tmp_path / "corpora"}"
[[data.sources]]
dataset = "jsonl"
path = "{identity}"
weight = 2
[[data.sources]]
dataset = "jsonl"
path = "{identity / "a.jsonl"}"
weight = 1
"""
    )
    write_json_lines(identity / "b.jsonl", make_documents(40, seed=3))
    inspect.main(["--config", str(file), "--num", "2", "--seed", "1", "--json", "-"])
    out = capsys.readouterr().out
    result = json.loads(out[out.index("{") :])
    assert len(result["corpora"]) == 2
    assert result["seq_len"] == 8
    assert result["description"].startswith("mixture of 66.67%")


def test_a_folder_that_is_no_corpus_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        inspect.main([str(tmp_path)])
    assert "no file index.json; expected a folder" in capsys.readouterr().err
