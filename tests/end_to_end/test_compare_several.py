"""Several comparisons in one command, killed and resumed, and continued on another machine."""

import csv
import time
from pathlib import Path

from support.comparison_runs import finished, start, write_base

TWO_AXES = """
name = "two axes"
config = "base.toml"
output_dir = "{folder}/out"
selection_seed = 1
report_seeds = [2]
baseline = "full_rank"
max_widenings = 0
communication_ranks = 2
axes = ["optimizer.lr", "optimizer.weight_decay"]
[[rows]]
name = "full_rank"
learning_rates = [1e-3, 2e-3, 4e-3]
tune."optimizer.weight_decay" = [0.0, 0.1]
set.method = {{ name = "full_rank" }}
[[rows]]
name = "sgd"
learning_rate_of = "full_rank"
set.method = {{ name = "full_rank" }}
set.optimizer = {{ name = "sgd", momentum = 0.9 }}
"""
QUICK = ("--skip-measurements",)
MACHINE = ("tokens_per_s", "peak_gib", "commit")
"""Columns that differ from run to run."""


def write_two(folder: Path) -> list[Path]:
    """Two comparisons with the same rows; the second one reports another seed."""
    folder.mkdir()
    write_base(folder)
    files = [folder / "first.toml", folder / "second.toml"]
    for file, seeds in zip(files, ("[2]", "[3]"), strict=True):
        file.write_text(
            TWO_AXES.format(folder=folder).replace("report_seeds = [2]", f"report_seeds = {seeds}")
        )
    return files


def runs_of(file: Path) -> list[dict[str, str]]:
    report = file.parent / "out" / "reports" / file.stem
    with (report / "runs.csv").open() as lines:
        return [
            {key: value for key, value in run.items() if key not in MACHINE}
            for run in csv.DictReader(lines)
        ]


def test_two_comparisons_killed_in_the_middle_have_the_same_runs_as_undisturbed_ones(tmp_path):
    undisturbed = write_two(tmp_path / "undisturbed")
    output, _ = (process := start(*undisturbed, "--jobs", "2", *QUICK)).communicate(timeout=600)
    assert process.returncode == 0, output
    # Three rates, the other weight decay, and one run of both rows on one seed.
    assert [len(runs_of(file)) for file in undisturbed] == [6, 6]
    assert len(finished(tmp_path / "undisturbed")) == 4 + 2 + 2

    killed = write_two(tmp_path / "killed")
    for num_finished in (2, 7):
        process = start(*killed, "--jobs", "2", *QUICK)
        while len(finished(tmp_path / "killed")) < num_finished:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=600)
    kept = {path: path.stat().st_mtime_ns for path in finished(tmp_path / "killed")}
    output, _ = (process := start(*killed, "--jobs", "2", *QUICK)).communicate(timeout=600)
    assert process.returncode == 0, output
    assert all(path.stat().st_mtime_ns == changed_at for path, changed_at in kept.items())
    for one, other in zip(undisturbed, killed, strict=True):
        assert runs_of(one) == runs_of(other)
        assert all(float(run["effective_rank"]) > 1 for run in runs_of(one))

    continue_without_folders(killed[0], tmp_path / "elsewhere")


def continue_without_folders(file: Path, folder: Path) -> None:
    """Continues a comparison in another folder, from the CSV file of all but its last run."""
    report = file.parent / "out" / "reports" / file.stem
    (first, _) = write_two(folder)
    lines = (report / "runs.csv").read_text().splitlines(keepends=True)
    (folder / "before.csv").write_text("".join(lines[:-1]))
    first.write_text('finished_runs = ["before.csv"]\n' + first.read_text())
    output, _ = (process := start(first, *QUICK)).communicate(timeout=600)
    assert process.returncode == 0, output
    assert len(finished(folder)) == 1
    assert runs_of(first) == runs_of(file)
