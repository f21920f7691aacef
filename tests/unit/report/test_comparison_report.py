"""A report of a comparison: its rows with deviations and intervals, and curves by row."""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from support.reported import finish_comparison, write_grid

from switchtitan.errors import ConfigError
from switchtitan.report.comparison_files import find_comparison, read_comparison
from switchtitan.report.comparison_report import comparison_report, mean_lines
from switchtitan.report.run_files import RunRecord


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison's report."""
    return finish_comparison(write_grid(tmp_path_factory.mktemp("comparison")))


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads(json.dumps(comparison_report(read_comparison(folder)), allow_nan=False))


def section(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [of for of in report["sections"] if of["id"] == name]
    return found


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_rows_have_the_figures_of_the_results(folder: Path) -> None:
    report, results = report_of(folder), results_of(folder)
    assert report["title"] == "two"
    assert report["subtitle"] == f"{folder} · 12 of 12 runs finished"
    (table,) = section(report, "results")["tables"]
    titles = [column["title"] for column in table["columns"]]
    for line, row in zip(table["rows"], results["rows"], strict=True):
        cells = dict(zip(titles, line["cells"], strict=True))
        loss = row["loss"]
        assert cells["test loss"]["text"] == f"{loss['mean']:.4f} ± {loss['std']:.4f}"
        assert cells["lr"]["value"] == row["values"]["optimizer.lr"]
        bits = row["test_bits_per_byte"]
        assert cells["test bits/byte"]["text"] == f"{bits['mean']:.4f} ± {bits['std']:.4f}"
        validation = row["validation_loss"]["mean"]
        assert cells["val. loss"]["text"].startswith(f"{validation:.4f} ± ")
        assert validation == pytest.approx(loss["mean"] - 0.1)
        assert cells["verdict"]["text"] == (row["verdict"] or "–")
        difference = cells["minus dense"]["text"]
        assert "peak, GiB" not in cells  # of CPUs it is not known
        assert (difference == "–") == (row["name"] == "dense")


def test_intervals_are_those_of_student(folder: Path) -> None:
    losses, differences = section(report_of(folder), "results")["intervals"]
    runs = results_of(folder)["runs"]
    for row, name in zip(losses["rows"], ("dense", "thin", "thin-balanced"), strict=True):
        seeds = [run["test_loss"] for run in runs if (run["stage"], run["row"]) == ("report", name)]
        assert row["mean"] == pytest.approx(fmean(seeds))
        assert row["points"] == pytest.approx(seeds, rel=1e-6)  # seven digits
        # One degree of freedom: 12.706 is the 97.5 % quantile.
        half = 12.706 * stdev(seeds) / math.sqrt(2)
        assert (row["low"], row["high"]) == pytest.approx((row["mean"] - half, row["mean"] + half))
    assert [row["series"] for row in differences["rows"]] == [1, 2]
    assert differences["zero"]


def test_curves_are_means_over_the_reported_seeds(folder: Path) -> None:
    record = read_comparison(folder)
    chart = section(report_of(folder), "curves")["charts"][0]
    curves = [run.curves["loss/train"] for run in record.runs["thin"].values()]
    assert len(curves) == 2
    shown = chart["curves"]["1"]
    assert shown["x"] == curves[0][0]
    pairs = list(zip(*(values for _, values in curves), strict=True))
    # Seven digits are kept.
    assert shown["y"] == pytest.approx([fmean(pair) for pair in pairs], rel=1e-6)
    assert shown["deviation"] == pytest.approx([stdev(pair) for pair in pairs], rel=1e-5)


def test_means_are_over_the_steps_of_all_runs() -> None:
    one = RunRecord(Path("one"), {"a": ([1, 2, 3], [1.0, 2.0, 3.0]), "b": ([1], [0.0])})
    two = RunRecord(Path("two"), {"a": ([2, 3, 4], [4.0, 5.0, 6.0])})
    lines = mean_lines([one, two])
    assert list(lines) == ["a"]
    assert lines["a"].x == [2, 3]
    assert lines["a"].y == [3.0, 4.0]
    assert lines["a"].deviation == pytest.approx([math.sqrt(2)] * 2)
    assert mean_lines([one])["a"].deviation is None


def test_the_choice_of_the_rate_is_drawn(folder: Path) -> None:
    (chart,) = section(report_of(folder), "selection")["charts"]
    assert chart["isLogAcross"]
    assert chart["curves"]["0"]["x"] == [0.001, 0.002, 0.004]
    assert set(chart["curves"]) == {"0", "1"}


def test_an_unfinished_comparison_says_so(tmp_path: Path) -> None:
    folder = finish_comparison(write_grid(tmp_path), num_reported=1)
    report = report_of(folder)
    assert report["notes"][0].startswith("7 of 12 runs are finished")
    (table,) = section(report, "results")["tables"]
    texts = [cell["text"] for cell in table["rows"][1]["cells"]]
    assert texts[1] == "–"


def test_a_run_that_is_gone_is_noted(folder: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder.parents[1], tmp_path / "moved"))
    (gone,) = (moved / "runs" / "thin").glob("*-seed-2")
    shutil.rmtree(gone)
    results = (moved / "reports" / "grid" / "results.json").read_text()
    (moved / "reports" / "grid" / "results.json").write_text(
        results.replace(str(folder.parents[1]), "/nowhere")
    )
    report = report_of(moved / "reports" / "grid")
    (note,) = report["notes"]
    assert note.startswith("thin, seed 2: /nowhere")
    assert note.endswith("no such folder; expected the output folder of a run")
    assert set(section(report, "curves")["charts"][0]["curves"]) == {"0", "1", "2"}


def test_a_comparison_is_found_by_either_of_its_folders(folder: Path, tmp_path: Path) -> None:
    assert find_comparison(folder) == folder
    assert find_comparison(folder.parents[1]) == folder
    assert find_comparison(tmp_path) is None
    run = next((folder.parents[1] / "runs" / "thin").iterdir())
    assert find_comparison(run) is None
    for name in ("one", "two"):
        shutil.copytree(folder, tmp_path / "reports" / name)
    with pytest.raises(ConfigError, match="2 comparisons have reports there; give one of"):
        find_comparison(tmp_path)


@pytest.mark.parametrize("damaged", ["", "{}", "[1]", '{"rows": 3}', "\x00"])
def test_damaged_results_are_refused(folder: Path, tmp_path: Path, damaged: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "reports" / "grid"))
    (copy / "results.json").write_text(damaged)
    with pytest.raises(ConfigError, match="holds no results of a comparison"):
        read_comparison(copy)
