"""Malformed records stop a preparation, or are left out and counted."""

import gzip
import json
import logging
import signal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.preparation import read_split, run_alone
from support.tiny import tiny_config
from support.tiny_documents import make_documents

from switchtitan.builders.trainer import build_trainer
from switchtitan.data import Corpus, DataConfig, open_corpus, open_prepared, plan_corpus
from switchtitan.data import segments as segments_module
from switchtitan.data.prepare import prepare_corpus
from switchtitan.distributed.world import start_world
from switchtitan.errors import CorpusError

DOCUMENTS = make_documents(60, seed=4)
BAD_LINES = [b"{", b"[1]", b'{"body": "x"}', b'{"text": 3}', b"\xff\xfe", b'{"text": "\xff"}']
SOURCES = ["text", "jsonl", "json.gz", "parquet"]


def write_source(dataset: str, folder: Path, bad: bool) -> int:
    """Writes the documents with malformed records between them; returns the number of those."""
    folder.mkdir(parents=True)
    if dataset == "text":
        for number, text in enumerate(DOCUMENTS):
            lines = b"not \xff UTF-8\n" if bad and number % 10 == 9 else b""
            (folder / f"{number:02d}.txt").write_bytes(lines + text.encode())
        return 6 * bad
    if dataset == "parquet":
        texts = [text.encode() for text in DOCUMENTS]
        if bad:
            texts[7:7] = [b"\xff", None, b"a\xfe"]
        column = pyarrow.array(texts, pyarrow.binary())
        # Not checked, as by a program that writes whatever it has.
        column = pyarrow.Array.from_buffers(pyarrow.string(), len(texts), column.buffers())
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
        return 3 * bad
    lines = [json.dumps({"text": text}).encode() for text in DOCUMENTS]
    if bad:
        lines[5:5] = BAD_LINES
        lines += BAD_LINES  # also after the last document
    data = b"\n".join(lines) + b"\n"
    (folder / f"a.{dataset}").write_bytes(gzip.compress(data) if dataset == "json.gz" else data)
    return 2 * len(BAD_LINES) * bad


def config_of(dataset: str, folder: Path, **keys: object) -> DataConfig:
    given = {"dataset": dataset, "path": folder, "vocab_size": 270, "validation_fraction": 0.1}
    return DataConfig.model_validate({**given, "cache_dir": folder.parent / "corpora", **keys})


def prepare(config: DataConfig) -> Corpus:
    return open_corpus(config, show_progress=False)


@pytest.mark.parametrize("dataset", SOURCES)
def test_skipped_records_are_counted_and_change_no_document(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    num_bad = write_source(dataset, tmp_path / "bad", bad=True)
    write_source(dataset, tmp_path / "good", bad=False)
    with caplog.at_level(logging.WARNING):
        skipping = prepare(config_of(dataset, tmp_path / "bad", on_bad_record="skip"))
    good = prepare(config_of(dataset, tmp_path / "good"))
    for split in ("train", "validation"):
        assert read_split(skipping, split) == read_split(good, split)
    assert skipping.fingerprint == good.fingerprint
    assert skipping.index.skipped_records == num_bad > 0
    assert good.index.skipped_records == 0
    assert skipping.description.endswith(f", without {num_bad} malformed records")
    assert f"{num_bad} malformed records were left out" in caplog.text
    named = [line for line in caplog.messages if line.startswith("skipping a malformed record: ")]
    assert len(named) == min(10, num_bad)
    assert all(str(tmp_path / "bad") in line for line in named)


@pytest.mark.parametrize(
    ("dataset", "place"),
    [
        ("text", r"09\.txt, line 1: expected UTF-8"),
        ("jsonl", r"a\.jsonl, line 6: expected one JSON object"),
        ("json.gz", r"a\.json\.gz, line 6: expected one JSON object"),
        ("parquet", r"a\.parquet, row 8: column 'text': expected UTF-8"),
    ],
)
def test_the_default_is_to_stop_and_to_name_file_and_line(
    dataset: str, place: str, tmp_path: Path
) -> None:
    write_source(dataset, tmp_path / "bad", bad=True)
    with pytest.raises(CorpusError, match=rf"{place}.*on_bad_record = 'skip'"):
        prepare(config_of(dataset, tmp_path / "bad"))
    assert not plan_corpus(config_of(dataset, tmp_path / "bad")).is_prepared


def test_a_corpus_that_leaves_out_records_has_its_own_folder(tmp_path: Path) -> None:
    write_source("jsonl", tmp_path / "bad", bad=True)
    skipping = config_of("jsonl", tmp_path / "bad", on_bad_record="skip")
    prepare(skipping)
    assert not plan_corpus(config_of("jsonl", tmp_path / "bad")).is_prepared


def test_files_without_a_single_text_are_named_with_their_number(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "x"}\n' * 7)
    with pytest.raises(CorpusError, match=r"no document for the train split \(7 malformed"):
        prepare(config_of("jsonl", tmp_path / "in", on_bad_record="skip"))


def test_a_file_that_ends_early_is_an_error_even_if_records_are_skipped(tmp_path: Path) -> None:
    write_source("json.gz", tmp_path / "in", bad=True)
    file = tmp_path / "in" / "a.json.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"a\.json\.gz: damaged or truncated gzip"):
        prepare(config_of("json.gz", tmp_path / "in", on_bad_record="skip"))


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_a_killed_preparation_resumes_bitwise_with_the_same_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(segments_module, "_BATCH_DOCUMENTS", 8)
    num_bad = write_source("jsonl", tmp_path / "bad", bad=True)
    config = config_of("jsonl", tmp_path / "bad", on_bad_record="skip")
    killed = run_alone(config, stop_after=stop_after)
    assert killed.wait(120) == -signal.SIGKILL
    assert not plan_corpus(config).is_prepared
    resumed = open_prepared(prepare_corpus(config, show_progress=False, segment_tokens=500))
    straight = config.model_copy(update={"cache_dir": tmp_path / "straight"})
    expected = open_prepared(prepare_corpus(straight, show_progress=False, segment_tokens=500))
    assert resumed.index == expected.index
    assert resumed.index.skipped_records == num_bad
    for file in resumed.folder.iterdir():
        assert file.read_bytes() == (expected.folder / file.name).read_bytes()


def test_skipping_has_no_effect_on_datasets_without_records() -> None:
    for given in ({}, {"dataset": "c4", "tokenizer": "t5-base"}):
        with pytest.raises(ValueError, match="on_bad_record = 'skip' has an effect only with"):
            DataConfig.model_validate({**given, "on_bad_record": "skip"})


def test_results_state_the_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    num_bad = write_source("jsonl", tmp_path / "bad", bad=True)
    keys = {"dataset": "jsonl", "path": tmp_path / "bad", "on_bad_record": "skip"}
    words = [word for key, value in keys.items() for word in (f"--data.{key}", str(value))]
    config = tiny_config(tmp_path / "run", "full_rank", *words, "--training.steps", "1")
    with caplog.at_level(logging.INFO):
        build_trainer(config, start_world(config.parallelism)).train()
    results = json.loads((config.job.output_dir / "results.json").read_text())
    assert results["corpus"]["skipped_records"] == num_bad
    assert f"without {num_bad} malformed records" in caplog.text
