"""`scripts/compare.py` as a user runs it: killed at any time, the same command resumes and
reports."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.comparison_runs import finished, start, write_base

GRID = """
name = "three rows"
config = "base.toml"
output_dir = "{folder}/out"
selection_seed = 1
report_seeds = [2, 3]
baseline = "full_rank"
max_widenings = 0
communication_ranks = 2
[[rows]]
name = "full_rank"
learning_rate_of = "thin"
set.method = {{ name = "full_rank" }}
[[rows]]
name = "thin"
label = "LoRA"
learning_rates = [1e-2, 2e-2, 1e30]
set.method = {{ name = "lora", rank = 4 }}
[[rows]]
name = "thin-balanced"
learning_rate_of = "thin"
set.method = {{ name = "lora", rank = 4, init = "balanced" }}
[[gaps]]
from_row = "thin"
to_row = "full_rank"
rows = ["thin-balanced"]
"""
NUM_RUNS = 3 + 6


def write_grid(folder: Path) -> Path:
    write_base(folder)
    file = folder / "grid.toml"
    file.write_text(GRID.format(folder=folder))
    return file


def unfinished(folder: Path) -> list[Path]:
    """Folders of runs with a checkpoint and no results."""
    with_checkpoint = {path.parents[1] for path in folder.glob("out/runs/*/*/checkpoints/step-*")}
    return sorted(with_checkpoint - {path.parent for path in finished(folder)})


def kill_training_of(comparison: subprocess.Popen[str]) -> None:
    children = Path(f"/proc/{comparison.pid}/task/{comparison.pid}/children").read_text().split()
    assert children
    for child in children:
        os.kill(int(child), signal.SIGKILL)


def result_without_interruption(run: Path, output: Path) -> dict:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "switchtitan",
            "train",
            "--config",
            run / "config.toml",
            "--job.output_dir",
            output,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return json.loads((output / "results.json").read_text())


def test_a_comparison_killed_at_any_time_reports_every_run_once_and_refuses_other_settings(
    tmp_path,
):
    file = write_grid(tmp_path)
    for num_finished, how in ((1, signal.SIGKILL), (3, signal.SIGTERM)):
        process = start(file)
        while len(finished(tmp_path)) < num_finished:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.send_signal(how)
        process.wait(600)
    left_before = set(unfinished(tmp_path))
    process = start(file)
    while not (killed := sorted(set(unfinished(tmp_path)) - left_before)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    kill_training_of(process)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "exited with status -9" in output
    kept = {path: path.stat().st_mtime_ns for path in finished(tmp_path)}
    output, _ = (process := start(file, "--jobs", "2")).communicate(timeout=600)
    assert process.returncode == 0, output
    assert output.rstrip().endswith(f"{tmp_path}/out/reports/grid/report.md")
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())

    assert "resuming from" in (killed[0] / "output.txt").read_text()
    continued = json.loads((killed[0] / "results.json").read_text())
    straight = result_without_interruption(killed[0], tmp_path / "straight")
    assert [continued[f"loss/{split}"] for split in ("validation", "test")] == [
        straight[f"loss/{split}"] for split in ("validation", "test")
    ]

    report = tmp_path / "out" / "reports" / "grid"
    with (report / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert (
        len(runs)
        == len({run["row"] + run["optimizer.lr"] + run["seed"] for run in runs})
        == NUM_RUNS
    )
    assert [run for run in runs if run["diverged"] == "True"] == [
        run for run in runs if run["row"] == "thin" and run["optimizer.lr"] == "1e+30"
    ]
    results = json.loads((report / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert results["num_runs_finished"] == results["num_runs"] == NUM_RUNS
    chosen = min(
        (run for run in runs if run["row"] == "thin" and run["seed"] == "1"), key=validation_loss
    )
    assert [row["values"] for row in rows.values()] == [
        {"optimizer.lr": float(chosen["optimizer.lr"])}
    ] * 3
    of_thin = [
        float(run["test_loss"]) for run in runs if run["row"] == "thin" and run["stage"] == "report"
    ]
    assert rows["thin"]["loss"]["mean"] == pytest.approx(sum(of_thin) / 2)
    measured = rows["full_rank"]["measured"]
    assert measured["step_ratio_low"] <= measured["step_ratio"] <= measured["step_ratio_high"]
    assert rows["full_rank"]["num_trainable"] > rows["thin"]["num_trainable"] > 0
    # Two ranks in a ring send half of the gathered bytes: at least the gradients, in fp32.
    assert measured["bytes_per_step"] >= 4 * rows["full_rank"]["num_trainable"] / 2
    for name in ("loss.png", "loss_against_time.png", "loss_against_memory.png"):
        assert (report / name).read_bytes().startswith(b"\x89PNG")
    assert "LoRA" in (report / "report.md").read_text()

    refuse_runs_of_other_settings(file)


def refuse_runs_of_other_settings(file: Path) -> None:
    base = file.with_name("base.toml")
    base.write_text(base.read_text().replace("warmup_steps = 3", "warmup_steps = 2"))
    output, _ = (process := start(file)).communicate(timeout=600)
    assert process.returncode == 2
    assert "this run has another [lr_schedule] than the comparison" in output
    assert "Traceback" not in output


def validation_loss(run: dict[str, str]) -> float:
    return float(run["validation_loss"])
