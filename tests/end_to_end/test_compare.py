"""`switchtitan compare` as a user runs it: killed at any time, it resumes, and reports each run."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
from support.comparisons import LR, write_grid
from support.sessions import started

from switchtitan.comparison.comparison import follow
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.runner import environments, train_all
from switchtitan.errors import UserError

GRID = """
name = "two rows"
config = "base.toml"
output_dir = "{folder}/out"
selection_seed = 1
report_seeds = [2]
baseline = "full_rank"
[[rows]]
name = "full_rank"
learning_rate_of = "thin"
set.method = {{ name = "full_rank" }}
[[rows]]
name = "thin"
label = "LoRA"
learning_rates = [1e-2, 2e-2, 1e30]
set.method = {{ name = "lora", rank = 4 }}
"""
SHORT = {
    "steps = 40": "steps = 30",
    "[checkpoint]\ninterval = 20": "[checkpoint]\ninterval = 5",
    "interval = 20\ntokens": "interval = 5\ntokens",
}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
NUM_SELECTED, NUM_REPORTED = 3, 2


def compare(file, *words):
    """Starts a comparison in its folder."""
    return started(
        [sys.executable, "-m", "switchtitan", "compare", str(file), *words],
        file.parent / "output.txt",
        cwd=file.parent,
        env=ENVIRONMENT,
    )


def finished(folder):
    return sorted((folder / "out" / "runs").glob("*/*/results.json"))


def unfinished(folder):
    """Folders of runs with a checkpoint and no results."""
    with_checkpoint = {path.parents[1] for path in folder.glob("out/runs/*/*/checkpoints/step-*")}
    return sorted(with_checkpoint - {path.parent for path in finished(folder)})


def kill_a_training(file):
    """Kills a training with a checkpoint; returns its folder and the comparison's end."""
    folder = file.parent
    left_before = set(unfinished(folder))
    with compare(file) as comparison:
        comparison.wait_until(lambda: set(unfinished(folder)) - left_before)
        killed = min(set(unfinished(folder)) - left_before)
        children = comparison.children()
        assert children
        for child in children:
            os.kill(child, signal.SIGKILL)
        status = comparison.process.wait(timeout=600)
    return killed, status, comparison.said


def train_alone(run, output):
    """Trains a run of a comparison without interruption; returns its results."""
    words = ("train", "--config", run / "config.toml", "--job.output_dir", output)
    command = [sys.executable, "-m", "switchtitan", *words]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return json.loads((output / "results.json").read_text())


def test_a_comparison_killed_at_any_time_reports_each_run_once(tmp_path):
    folder = tmp_path / "killed"
    folder.mkdir()
    file = write_grid(folder, GRID, SHORT)
    with compare(file, "--jobs", "2") as comparison:
        comparison.wait_until(lambda: finished(folder))
        comparison.process.send_signal(signal.SIGKILL)
        comparison.process.wait(timeout=600)
    killed, status, output = kill_a_training(file)
    assert (status, "exited with status -9" in output) == (2, True), output
    kept = {path: path.stat().st_mtime_ns for path in finished(folder)}
    with compare(file) as comparison:
        assert comparison.process.wait(timeout=600) == 0, comparison.said
    assert "Traceback" not in comparison.said
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())
    assert len(finished(folder)) == NUM_SELECTED + NUM_REPORTED

    assert "resuming from" in (killed / "output.txt").read_text()
    continued = json.loads((killed / "results.json").read_text())
    straight = train_alone(killed, tmp_path / "straight")
    for split in ("validation", "test"):
        assert continued[f"loss/{split}"] == straight[f"loss/{split}"]

    check_report(folder / "out" / "reports" / file.stem)


def check_report(folder):
    with (folder / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert len(runs) == NUM_SELECTED + NUM_REPORTED
    assert [run[LR] for run in runs if run["diverged"] == "True"] == ["1e+30"]
    tried = [run for run in runs if run["seed"] == "1"]
    chosen = min(tried, key=lambda run: float(run["validation_loss"]))[LR]
    of_rows = {run["row"]: run for run in runs if run["seed"] == "2"}
    assert [run[LR] for run in of_rows.values()] == [chosen] * NUM_REPORTED
    text = (folder / "report.md").read_text()
    assert f"{len(runs)} of {len(runs)} runs are finished" in text
    assert "| LoRA |" in text
    assert f"{float(of_rows['thin']['test_loss']):.4f} (1 run)" in text
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_run_stops_the_comparison_and_shows_what_it_printed(tmp_path):
    file = write_grid(
        tmp_path, GRID, {'dataset = "pystdlib"': 'dataset = "text"\npath = "nowhere"'}
    )
    runs = follow(load_comparison(file), lambda run: None).due
    with pytest.raises(UserError, match=r"(?s)status 2 .*output.txt .*nowhere"):
        train_all(runs, environments(1), lambda run: False)
    assert not runs[2].folder.exists()
