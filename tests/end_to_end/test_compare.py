"""`switchtitan compare` as a user runs it: killed, it resumes, and reports each run."""

import csv
import os
import signal
import sys

import pytest
from support.comparisons import GRID, LR, write_grid
from support.sessions import started

from switchtitan.errors import UserError
from switchtitan.workbench.comparison.comparison import follow
from switchtitan.workbench.comparison.config import load_comparison
from switchtitan.workbench.comparison.runner import environments, train_all

SHORT_GRID = (
    GRID.replace("learning_rates = [1e-3, 2e-3, 4e-3]", 'learning_rate_of = "thin"')
    .replace("4e-2]", "1e30]")
    .replace("report_seeds = [2, 3]", "report_seeds = [2]")
)
SHORT = {
    "steps = 40": "steps = 30",
    "[checkpoint]\ninterval = 20": "[checkpoint]\ninterval = 5",
    "interval = 20\ntokens": "interval = 5\ntokens",
}


def compare(file, *words):
    """Starts a comparison in its folder."""
    command = [sys.executable, "-m", "switchtitan", "compare", str(file), *words]
    return started(command, file.parent / "output.txt", cwd=file.parent)


def finished(folder):
    return sorted((folder / "out" / "runs").glob("*/*/results.json"))


def unfinished(folder):
    """Folders of runs with a checkpoint and no results."""
    with_checkpoint = {path.parents[1] for path in folder.glob("out/runs/*/*/checkpoints/step-*")}
    return sorted(with_checkpoint - {path.parent for path in finished(folder)})


def test_a_killed_comparison_reports_each_run_once(tmp_path):
    file = write_grid(tmp_path, SHORT_GRID, SHORT)
    with compare(file, "--jobs", "2") as comparison:
        comparison.wait_until(lambda: finished(tmp_path))
        before = set(unfinished(tmp_path))
        comparison.wait_until(lambda: set(unfinished(tmp_path)) - before)
        (killed, *_) = set(unfinished(tmp_path)) - before
        comparison.process.send_signal(signal.SIGSTOP)  # it starts no other training
        for process in (*comparison.children(), comparison.process.pid):
            os.kill(process, signal.SIGKILL)
    kept = {path: path.stat().st_mtime_ns for path in finished(tmp_path)}
    with compare(file) as comparison:
        assert comparison.process.wait(timeout=600) == 0, comparison.said
    assert "Traceback" not in comparison.said
    assert "resuming from" in (killed / "output.txt").read_text()
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())
    with (tmp_path / "out" / "reports" / file.stem / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert len(runs) == len(finished(tmp_path)) == 3 + 3
    assert [run[LR] for run in runs if run["diverged"] == "True"] == ["1e+30"]
    tried = [run for run in runs if run["seed"] == "1"]
    chosen = min(tried, key=lambda run: float(run["validation_loss"]))[LR]
    assert [run[LR] for run in runs if run["seed"] == "2"] == [chosen] * 3


def test_a_failed_run_stops_the_comparison_and_shows_what_it_printed(tmp_path):
    file = write_grid(
        tmp_path, SHORT_GRID, {'dataset = "pystdlib"': 'dataset = "text"\npath = "nowhere"'}
    )
    runs = follow(load_comparison(file), lambda run: None).due
    with pytest.raises(UserError, match=r"(?s)status 2 .*output.txt .*nowhere"):
        train_all(runs, environments(1), lambda run: False)
    assert not runs[2].folder.exists()
