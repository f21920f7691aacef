"""The HTML report of runs and comparisons: figures, bounded curves, and text that stays text."""

import base64
import hashlib
import json
import math
import os
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from support.reported import (
    NUM_STEPS,
    finish_comparison,
    results,
    write_curves,
    write_grid,
    write_run,
)

from switchtitan.errors import ConfigError
from switchtitan.report.comparison_files import find_comparison, read_comparison
from switchtitan.report.comparison_report import comparison_report
from switchtitan.report.page import embedded, render, write_report
from switchtitan.report.points import (
    MAX_POINTS,
    MAX_POINTS_OF_CURVE,
    Line,
    plain,
    points_of_curve,
    shorten,
)
from switchtitan.report.run_files import RunRecord, read_run
from switchtitan.report.run_report import run_report
from switchtitan.spectra.spectra_files import SPECTRA_FOLDER, write_spectra

HOSTILE = '</script><b>&amp;<!--<script> ]]> \u2028 \ud800 {{script}} "'
MAX_REPORT_BYTES = 9_500_000
"""400 000 points of at most 22 bytes, and the page's code."""


def section(report, name):
    (found,) = (of for of in report["sections"] if of["id"] == name)
    return found


def cells_of(report, name, line=0):
    """The cells of a line of a section's table, by the column's title."""
    (table,) = section(report, name)["tables"]
    titles = [column["title"] for column in table["columns"]]
    return dict(zip(titles, table["rows"][line]["cells"], strict=True))


# ---- The page


class Elements(HTMLParser):
    """All elements of a page, and the text of its scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes = [], []
        self.inside = {"script": [], "style": [], "title": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        self.names.append(f"/{tag}")

    def handle_data(self, data):
        if self.names and self.names[-1] in self.inside:
            self.inside[self.names[-1]].append(data)


def contents(title):
    return {"title": title, "subtitle": title, "notes": [title], "series": [], "sections": []}


def test_hostile_text_adds_no_element_and_reads_back():
    plain_page, hostile = Elements(render(contents("run"))), Elements(render(contents(HOSTILE)))
    assert hostile.names == plain_page.names
    assert json.loads(hostile.inside["script"][0])["notes"] == [HOSTILE]
    assert "{{" not in render(contents("run"))


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "\u2028", "a&b", HOSTILE])
def test_embedded_json_has_no_markup(text):
    found = embedded({text: [text, 1.5]})
    assert found.isascii()
    assert not set(found) & set("<>&")
    assert json.loads(found) == {text: [text, 1.5]}


def test_the_policy_allows_the_pages_own_code_and_nothing_else():
    page = render(contents("run"))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    found = Elements(page)
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inside[kind][-1].encode()).digest())
        assert f"{kind}-src 'sha256-{digest.decode()}'" in policy
    assert not {name for name, _ in found.attributes} & {"src", "href", "srcset", "onload"}
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_only_a_report_is_replaced(tmp_path):
    output = tmp_path / "new folder" / "report.html"
    write_report(render(contents("first")), output)
    write_report(render(contents("second")), output)
    assert "second" in output.read_text()
    for other in ("", "<!doctype html><p>mine</p>", " " * 600 + render(contents("late"))):
        output.write_text(other)
        with pytest.raises(ConfigError, match=re.escape(str(output))):
            write_report(render(contents("third")), output)
        assert output.read_text() == other
    for place in (tmp_path, output / "report.html"):
        with pytest.raises(ConfigError, match=re.escape(str(place))):
            write_report("", place)


# ---- Curves


def noise(num):
    draw = random.Random(1)
    return [draw.gauss(3.0, 1.0) for _ in range(num)]


@pytest.mark.parametrize("max_points", [6, 50, MAX_POINTS_OF_CURVE])
def test_a_long_curve_keeps_its_ends_and_extremes_within_the_bound(max_points):
    values = noise(10_000)
    values[3_141], values[9_265], values[777] = -50.0, 60.0, math.nan
    deviations = [2 * value for value in values]
    points = shorten(Line(list(range(10_000)), values, deviations), max_points)
    kept = dict(zip(points["x"], points["y"], strict=True))
    assert len(kept) + len(points["mean_x"]) <= max_points
    assert (kept[3_141], kept[9_265], kept[777]) == (-50.0, 60.0, "nan")
    assert {0, 9_999} <= kept.keys()
    assert points["x"] == sorted(points["x"])
    assert all(kept[step] == plain([values[step]])[0] for step in kept)
    assert points["deviation"] == plain([deviations[step] for step in kept])


def test_every_bucket_keeps_its_extremes_and_mean():
    values = noise(10_000)
    points = shorten(Line(list(range(10_000)), values), 402)
    for start in range(0, 10_000, 100):
        bucket = range(start, start + 100)
        assert {min(bucket, key=values.__getitem__), max(bucket, key=values.__getitem__)} <= set(
            points["x"]
        )
    # The mean of equally large buckets' means is the mean, up to rounding to seven digits.
    assert fmean(points["mean_y"]) == pytest.approx(fmean(values), rel=1e-6)


@pytest.mark.parametrize("num_curves", [0, 1, 10, 1_000, 60_000])
def test_all_curves_of_a_report_share_its_points(num_curves):
    of_each = points_of_curve(num_curves, MAX_POINTS)
    assert num_curves * of_each <= MAX_POINTS
    assert 6 <= of_each <= MAX_POINTS_OF_CURVE


# ---- Runs


def report_of(**folders):
    found = run_report({name: read_run(folder) for name, folder in folders.items()})
    return json.loads(json.dumps(found, allow_nan=False))


def test_the_summary_has_the_figures_of_the_results(tmp_path):
    run = read_run(write_run(tmp_path, final=3.0))
    assert run.notes == ()
    assert run.curves["loss/train"][0] == list(range(1, NUM_STEPS + 1))
    cells, expected = cells_of(report_of(run=tmp_path), "summary"), results(3.0)
    texts = {"method": "switchlora, rank 8", "parameters": "2.17M, 1.37M train"}
    texts |= {"final val. loss": "3.1000", "test loss": "3.2000", "wall time": "1m35s"}
    texts |= {"peak memory": "1.50 GiB", "device": "2 x CPU", "commit": "0123456789"}
    assert {title: cells[title]["text"] for title in texts} == texts
    assert cells["steps"]["value"] == expected["step"]
    assert cells["tokens"]["value"] == expected["tokens_seen"]
    assert cells["tokens/s"]["value"] == expected["throughput/tokens_per_s"]
    assert cells["best val. loss"]["value"] == min(run.curves["loss/validation"][1])


def test_an_unfinished_and_a_diverged_run_say_so(tmp_path):
    write_curves(tmp_path / "one", final=3.0, num_steps=20)
    (tmp_path / "one" / "config.toml").write_text("[training]\nsteps = 50")
    report = report_of(run=tmp_path / "one")
    cells = cells_of(report, "summary")
    assert (cells["steps"]["text"], cells["tokens"]["value"]) == ("20 of 50", 20 * 128)
    assert "not finished" in report["notes"][0]
    run = write_run(tmp_path / "two")
    diverged = results(3.0) | {"loss/validation": math.nan, "diverged": True}
    (run / "results.json").write_text(json.dumps(diverged))
    cells = cells_of(report_of(run=run), "summary")
    assert cells["final val. loss"]["text"] == "nan"
    assert cells["steps"]["text"] == "60 (diverged)"


def test_runs_are_compared_by_what_differs_and_every_metric_has_a_chart(tmp_path):
    one = write_run(tmp_path / "one", 3.0, rank=8)
    two = write_run(tmp_path / "two", 2.0, rank=16)
    (two / "config.toml").write_text((two / "config.toml").read_text() + "seed = 3\n")
    write_spectra(two / SPECTRA_FOLDER, 9, {"a.q_proj": torch.tensor([1.0, 1.0, 0.0, 0.0])})
    report = report_of(one=one, two=two)
    differing = section(report, "configuration")["config"]["differing"]
    assert differing == [["method.rank", ["8", "16"]], ["training.seed", [None, "3"]]]
    best = [cells_of(report, "summary", line)["final val. loss"].get("isBest") for line in (0, 1)]
    assert best == [False, True]
    spectrum, ranks = section(report, "spectra")["charts"]
    assert spectrum["curves"]["1"]["y"] == [1, 1, 0, 0]
    assert ranks["curves"]["1"] == {"x": [9], "y": [2.0]}
    charts = [chart for of in report["sections"] for chart in of.get("charts", [])]
    metrics = {chart["metric"] for chart in charts if chart not in (spectrum, ranks)}
    assert metrics == set(read_run(one).curves) - {"data/tokens_seen"}


def test_a_report_of_long_runs_stays_below_its_bound():
    # Numbers as long as they can be: a sign, seven digits, an exponent.
    steps, values = list(range(20_000)), [-1e-5 * value for value in noise(20_000)]
    values[7_123] = 99.0
    curves = dict.fromkeys([f"metric/{index}" for index in range(14)], (steps, values))
    # More curves than may have the most points.
    found = run_report({f"run {index}": RunRecord(Path("x"), curves) for index in range(15)})
    assert 0.2 * MAX_REPORT_BYTES < len(render(found).encode()) < MAX_REPORT_BYTES
    charts = [chart for of in found["sections"] for chart in of.get("charts", [])]
    assert len(charts) == 14
    assert {max(of["y"]) for chart in charts for of in chart["curves"].values()} == {99.0}


@pytest.mark.parametrize(
    ("name", "damaged", "note"),
    [
        ("results.json", b"{", "results.json"),
        ("results.json", None, "at most"),
        ("results.json", json.dumps(results(4.0, NUM_STEPS - 2)).encode(), "results.json"),
        ("config.toml", b"x", "config.toml"),
        ("spectra/step-000000001.safetensors", b"x", "spectra"),
        ("tensorboard/profile_summary.json", b"[", "profile"),
    ],
)
def test_a_damaged_file_is_noted_and_the_others_are_read(tmp_path, name, damaged, note):
    file = write_run(tmp_path) / name
    file.parent.mkdir(exist_ok=True)
    if damaged is None:
        os.truncate(file, 1 << 30)
    else:
        file.write_bytes(damaged)
    run = read_run(tmp_path)
    assert note in " ".join(run.notes)
    assert len(run.notes) == 1
    assert len(run.curves["loss/train"][0]) == NUM_STEPS


def test_the_folder_of_no_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing", "file"):
        with pytest.raises(ConfigError, match=name):
            read_run(tmp_path / name)


# ---- Comparisons


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a finished comparison's report."""
    return finish_comparison(write_grid(tmp_path_factory.mktemp("comparison")))


def report_of_comparison(folder):
    return json.loads(json.dumps(comparison_report(read_comparison(folder)), allow_nan=False))


def test_rows_have_the_figures_of_the_results_and_students_intervals(compared):
    report = report_of_comparison(compared)
    saved = json.loads((compared / "results.json").read_text())
    drawn, _ = section(report, "results")["intervals"]
    for line, row in enumerate(saved["rows"]):
        cells, loss = cells_of(report, "results", line), row["loss"]
        assert cells["test loss"]["text"] == f"{loss['mean']:.4f} ± {loss['std']:.4f}"
        assert cells["lr"]["value"] == row["values"]["optimizer.lr"]
        assert cells["verdict"]["text"] == (row["verdict"] or "–")
        runs = [of for of in saved["runs"] if (of["stage"], of["row"]) == ("report", row["name"])]
        seeds = [run["test_loss"] for run in runs]
        # One degree of freedom: 12.706 is the 97.5 % quantile.
        half = 12.706 * stdev(seeds) / math.sqrt(2)
        ends = (drawn["rows"][line]["low"], drawn["rows"][line]["high"])
        assert ends == pytest.approx((fmean(seeds) - half, fmean(seeds) + half))
    (chosen,) = section(report, "selection")["charts"]
    assert chosen["curves"]["0"]["x"] == [0.001, 0.002, 0.004]


def test_what_is_missing_of_a_comparison_is_noted_or_refused(compared, tmp_path):
    unfinished = finish_comparison(write_grid(tmp_path), num_reported=1)
    assert "7 of 12 runs" in report_of_comparison(unfinished)["notes"][0]
    assert find_comparison(compared) == find_comparison(compared.parents[1]) == compared
    assert find_comparison(tmp_path) is None
    shutil.rmtree(next((tmp_path / "out" / "runs").glob("dense/*-seed-2")))
    (note,) = (of for of in report_of_comparison(unfinished)["notes"] if "seed 2" in of)
    assert "no such folder" in note
    for damaged in ("", "{}", "[1]", '{"rows": 3}', "\x00"):
        (unfinished / "results.json").write_text(damaged)
        with pytest.raises(ConfigError, match="grid"):
            read_comparison(unfinished)
