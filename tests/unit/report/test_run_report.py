"""The contents of a report of runs: figures, curves, differences of configurations."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from support.reported import results, write_curves, write_run

from switchtitan.report.charts import MAIN
from switchtitan.report.page import render
from switchtitan.report.run_files import RunRecord, read_run
from switchtitan.report.run_report import run_report

MAX_REPORT_BYTES = 9_500_000
"""400 000 points of at most 22 bytes, and the page's code."""


def report_of(**folders: Path) -> dict[str, Any]:
    contents = run_report({name: read_run(folder) for name, folder in folders.items()})
    return json.loads(json.dumps(contents, allow_nan=False))


def section(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [of for of in report["sections"] if of["id"] == name]
    return found


def summary_cells(report: dict[str, Any], line: int) -> dict[str, dict[str, Any]]:
    (table,) = section(report, "summary")["tables"]
    titles = [column["title"] for column in table["columns"]]
    return dict(zip(titles, table["rows"][line]["cells"], strict=True))


def test_the_summary_has_the_figures_of_the_results(tmp_path: Path) -> None:
    cells = summary_cells(report_of(run=write_run(tmp_path, final=3.0)), 0)
    expected = results(3.0)
    assert cells["method"]["text"] == "switchlora, rank 8"
    assert cells["parameters"]["text"] == "2.17M, 1.37M train"
    assert cells["steps"]["value"] == expected["step"]
    assert cells["tokens"]["value"] == expected["tokens_seen"]
    assert cells["final val. loss"]["text"] == "3.1000"
    assert cells["test loss"]["text"] == "3.2000"
    assert cells["tokens/s"]["value"] == expected["throughput/tokens_per_s"]
    assert cells["peak memory"]["text"] == "1.50 GiB"
    assert cells["wall time"]["text"] == "1m35s"
    assert cells["dtype"]["text"] == "float32"
    assert cells["device"]["text"] == "2 x CPU"
    assert cells["commit"] == {"text": "0123456789", "value": expected["commit"]} | {
        "hint": expected["commit"]
    }


def test_the_best_loss_is_the_lowest_of_the_curve(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    steps, losses = run.curves["loss/validation"]
    best = summary_cells(report_of(run=tmp_path), 0)["best val. loss"]
    assert best["value"] == min(losses)
    assert best["hint"] == f"at step {steps[losses.index(min(losses))]}"


def test_an_unfinished_run_has_the_figures_of_its_curves(tmp_path: Path) -> None:
    write_curves(tmp_path, final=3.0, num_steps=20)
    (tmp_path / "config.toml").write_text("[training]\nsteps = 50")
    report = report_of(run=tmp_path)
    cells = summary_cells(report, 0)
    assert cells["steps"]["text"] == "20 of 50"
    assert cells["tokens"]["value"] == 20 * 128
    assert cells["tokens/s"]["value"] == 1020.0
    assert cells["wall time"]["text"] == "–"
    assert "test loss" not in cells
    assert report["notes"][0].startswith("run: no results.json: the run is not finished")
    assert report["series"][0]["tokensPerStep"] == 128


def test_only_keys_that_differ_are_in_the_difference(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", rank=8, name="one")
    two = write_run(tmp_path / "two", rank=16, name="two")
    (two / "config.toml").write_text((two / "config.toml").read_text() + "seed = 3\n")
    config = section(report_of(one=one, two=two), "configuration")["config"]
    assert config["differing"] == [
        ["method.rank", ["8", "16"]],
        ["training.seed", [None, "3"]],
    ]
    same = dict(config["same"])
    assert same["method.name"] == '"switchlora"'
    assert not {"job.name", "method.rank"} & same.keys()


def test_the_lowest_loss_is_marked_only_among_several(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, final) for name, final in (("one", 3.0), ("two", 2.0)))
    report = report_of(one=one, two=two)
    marked = [summary_cells(report, line)["final val. loss"].get("isBest") for line in (0, 1)]
    assert marked == [False, True]
    assert "isBest" not in summary_cells(report_of(one=one), 0)["final val. loss"]


def test_every_metric_has_a_chart(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    report = report_of(run=run)
    charts = [chart for of in report["sections"] for chart in of.get("charts", [])]
    assert {chart["metric"] for chart in charts} == set(read_run(run).curves) - {"data/tokens_seen"}
    assert [chart["metric"] for chart in section(report, "curves")["charts"]][:3] == [
        "loss/train",
        "loss/validation",
        "perplexity/validation",
    ]
    (bar,) = section(report, "switches")["bars"][0]["rows"]
    assert bar["text"] == "60.0%"


def test_runs_without_curves_have_no_charts(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[method]\nname = 'lora'")
    report = report_of(run=tmp_path)
    assert [of["id"] for of in report["sections"]] == ["summary", "configuration"]


def test_a_profile_is_shown_by_region(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    region = {"num_calls": 2, "device_ms": 0.0}
    profile = {
        "rank": 0,
        "num_steps": 2,
        "step_ms": 7.0,
        "regions": {
            "forward": region | {"host_ms": 3.0},
            "backward": region | {"host_ms": 4.0},
            "save": region | {"host_ms": 100.0},
        },
        "operations": [{"name": "aten::mm", "num_calls": 4, "self_ms": 5.0, "share": 0.7}],
        "memory_mib": [],
    }
    (run / "tensorboard" / "profile_summary.json").write_text(json.dumps([profile]))
    of = section(report_of(run=run), "profile")
    (row,) = of["bars"][0]["rows"]
    assert row["text"] == "7.0 ms"
    assert [part["name"] for part in row["parts"]] == ["forward 3.00 ms", "backward 4.00 ms"]
    assert of["folded"][0]["rows"][0]["name"] == "aten::mm"


def test_spectra_are_drawn_from_the_last_measurement(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    spectra = {
        5: {"a.q_proj": torch.ones(4)},
        9: {"a.q_proj": torch.tensor([1.0, 1.0, 0.0, 0.0])},
    }
    record = RunRecord(run.folder, run.curves, run.results, run.config, spectra)
    of = section(json.loads(json.dumps(run_report({"run": record}))), "spectra")
    spectrum, ranks = of["charts"]
    assert spectrum["curves"]["0"]["y"] == [1, 1, 0, 0]
    assert ranks["curves"]["0"] == {"x": [5, 9], "y": [4.0, 2.0]}


def test_a_report_of_long_runs_stays_below_its_bound() -> None:
    draw = random.Random(1)
    steps = list(range(100_000))
    values = [draw.gauss(0, 1e-5) for _ in steps]
    values[70_123] = 9.0
    names = [*MAIN, *(f"metric/{index}" for index in range(7))]
    curves = dict.fromkeys(names, (steps, values))
    # More curves than may have the most points.
    runs = {f"run {index}": RunRecord(Path("x"), curves) for index in range(15)}
    contents = run_report(runs)
    assert 0.5 * MAX_REPORT_BYTES < len(render(contents).encode()) < MAX_REPORT_BYTES
    charts = [chart for of in contents["sections"] for chart in of.get("charts", [])]  # type: ignore[attr-defined]
    assert len(charts) == 14
    for chart in charts:
        for points in chart["curves"].values():
            assert max(points["y"]) == 9.0


def test_losses_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    contents = results(3.0) | {"loss/validation": math.nan, "diverged": True}
    (run / "results.json").write_text(json.dumps(contents))
    cells = summary_cells(report_of(run=run), 0)
    assert cells["final val. loss"] == {"text": "nan", "value": None, "hint": None}
    assert cells["steps"]["text"] == "60 (diverged)"
