"""`switchtitan compare` as a user runs it: killed at any time, it resumes, and reports each run."""

import csv
import json
import os
import signal
import subprocess
import sys

from support.comparison_runs import compare, finished, write_base

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
QUICK = ("--jobs", "2")
NUM_SELECTED, NUM_REPORTED = 3, 2
MACHINE = ("tokens_per_s", "peak_gib", "commit")
"""Columns that differ from run to run."""


def write_comparison(folder):
    folder.mkdir()
    write_base(folder)
    file = folder / "first.toml"
    file.write_text(GRID.format(folder=folder))
    return file


def complete(*words):
    """Returns the status and the output of a comparison that nothing disturbs."""
    with compare(*words) as comparison:
        status = comparison.process.wait(timeout=600)
    assert "Traceback" not in comparison.said
    return status, comparison.said


def stop_when(is_reached, number, *words):
    with compare(*words) as comparison:
        comparison.wait_until(is_reached)
        comparison.process.send_signal(number)
        comparison.process.wait(timeout=600)


def unfinished(folder):
    """Folders of runs with a checkpoint and no results."""
    with_checkpoint = {path.parents[1] for path in folder.glob("out/runs/*/*/checkpoints/step-*")}
    return sorted(with_checkpoint - {path.parent for path in finished(folder)})


def kill_a_training(folder, *words):
    """Kills a training with a checkpoint; returns its folder and the comparison's end."""
    left_before = set(unfinished(folder))
    with compare(*words) as comparison:
        comparison.wait_until(lambda: set(unfinished(folder)) - left_before)
        killed = min(set(unfinished(folder)) - left_before)
        children = comparison.children()
        assert children
        for child in children:
            os.kill(child, signal.SIGKILL)
        status = comparison.process.wait(timeout=600)
    return killed, status, comparison.said


def runs_of(file):
    report = file.parent / "out" / "reports" / file.stem
    with (report / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    return [{key: run[key] for key in run if key not in MACHINE} for run in runs]


def train_alone(run, output):
    """Trains a run of a comparison without interruption; returns its results."""
    words = ("train", "--config", run / "config.toml", "--job.output_dir", output)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "switchtitan", *words]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return json.loads((output / "results.json").read_text())


def test_a_comparison_killed_at_any_time_reports_each_run_once(tmp_path):
    folder = tmp_path / "killed"
    file = write_comparison(folder)
    stop_when(lambda: len(finished(folder)) >= 1, signal.SIGKILL, file, *QUICK)
    killed, status, output = kill_a_training(folder, file)
    assert (status, "exited with status -9" in output) == (2, True), output
    kept = {path: path.stat().st_mtime_ns for path in finished(folder)}
    status, output = complete(file)
    assert status == 0, output
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())
    assert len(finished(folder)) == NUM_SELECTED + NUM_REPORTED

    assert "resuming from" in (killed / "output.txt").read_text()
    continued = json.loads((killed / "results.json").read_text())
    straight = train_alone(killed, tmp_path / "straight")
    for split in ("validation", "test"):
        assert continued[f"loss/{split}"] == straight[f"loss/{split}"]

    check_report(file)


def check_report(file):
    runs = runs_of(file)
    assert len(runs) == NUM_SELECTED + NUM_REPORTED
    diverged = [run["optimizer.lr"] for run in runs if run["diverged"] == "True"]
    assert diverged == ["1e+30"]
    tried = [run for run in runs if run["seed"] == "1"]
    chosen = min(tried, key=lambda run: float(run["validation_loss"]))["optimizer.lr"]
    report = file.parent / "out" / "reports" / file.stem
    of_rows = [run["optimizer.lr"] for run in runs if run["stage"] == "report"]
    assert of_rows == [chosen] * NUM_REPORTED
    text = (report / "report.md").read_text()
    assert f"{len(runs)} of {len(runs)} runs are finished" in text
    (of_thin,) = [run for run in runs if run["row"] == "thin" and run["stage"] == "report"]
    assert f"{float(of_thin['test_loss']):.4f} (1 run)" in text
    assert "LoRA" in text
    assert (report / "loss.png").read_bytes().startswith(b"\x89PNG")
