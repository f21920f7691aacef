"""Experiment trackers, offline: each gets the run's metrics; one that is missing is an error."""

import sqlite3
from pathlib import Path

import pytest

from switchtitan.errors import EnvironmentMismatchError
from switchtitan.job import output_checks
from switchtitan.observability import MetricsConfig, Reporter, trackers
from switchtitan.observability.trackers import build_tracker

HPARAMS = {"optimizer.lr": 0.5, "method.name": "switchlora"}


def report_to(tracker: str, folder: Path, steps: range) -> None:
    sink = build_tracker(tracker, folder, "tiny", HPARAMS)
    config = MetricsConfig(progress_bar=False, tensorboard=False)
    reporter = Reporter(config, folder, num_steps=9, is_main=True, trackers=[sink])
    for step in steps:
        reporter.report(step, {"loss/train": 1 / step, "time/forward_ms": 2.5})
    reporter.summary({"step": 9})
    reporter.close()


def test_wandb_offline_writes_one_run_that_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    report_to("wandb", tmp_path, range(1, 4))
    report_to("wandb", tmp_path, range(4, 6))
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_run.txt").read_text().strip()
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    written = b"".join(file.read_bytes() for file in files)
    assert b"loss/train" in written
    assert b"switchlora" in written


def test_trackio_writes_the_metrics_to_its_local_database(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    monkeypatch.setenv("TRACKIO_PROJECT", "of-a-test")
    for module in (trackio, sqlite_storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "db")
    report_to("trackio", tmp_path / "run", range(1, 4))
    (database,) = (tmp_path / "db").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows] == [1, 2, 3]
    assert all("loss/train" in str(metrics) for _, metrics in rows)


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    config = MetricsConfig(trackers=("wandb",))
    monkeypatch.setattr(output_checks, "find_spec", lambda name: None)
    (message,) = output_checks.check_trackers(config)
    assert "pip install 'switchtitan[wandb]'" in message
    monkeypatch.undo()
    assert output_checks.check_trackers(MetricsConfig()) == []


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not output_checks._is_installed("no_such_tracker")
    assert output_checks._is_installed("torch")


def test_a_tracker_that_does_not_start_says_how_to_work_offline(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(trackers._BUILDERS, "wandb", refuse)
    with pytest.raises(EnvironmentMismatchError, match="WANDB_MODE=offline"):
        build_tracker("wandb", tmp_path, "tiny", HPARAMS)
