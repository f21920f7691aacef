"""The page of runs: figures as written, keys that differ, and text that stays text."""

import json
import re
from html import escape

import pytest
from support.comparisons import write_curves

from switchtitan.errors import ConfigError
from switchtitan.observability.tensorboard import read_curves
from switchtitan.workbench.report.page import curve_panels, draw, write_page

CONFIG = """
[job]
name = "run"
[method]
name = "switchlora"
rank = {rank}
[training]
steps = 60
"""
HOSTILE = '</table><script>alert("&amp;")</script>'


def write_run(folder, rank=8):
    """Writes the folder of a finished run."""
    write_curves(folder, final=3.0)
    (folder / "config.toml").write_text(CONFIG.format(rank=rank))
    results = {"step": 60, "loss/test": 3.2, "num_parameters": {"trainable": 1_370_000}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def rows_of(page):
    """The cells of each row of the page's tables, as they are written."""
    rows = re.findall(r"<tr\b[^>]*>(.*?)</tr>", page, re.DOTALL)
    return [re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]


def page_of(folders, tmp_path):
    figure = draw(curve_panels({label: read_curves(run) for label, run in folders.items()}))
    write_page(folders, {"Curves": (figure, None)}, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_page_has_results_curves_and_the_keys_that_differ(tmp_path):
    running = write_run(tmp_path / "running", rank=16)
    (running / "results.json").unlink()
    page = page_of({"done": write_run(tmp_path / "done"), "running": running}, tmp_path)
    assert page.count("<svg") == 1
    # Nothing that a browser would load.
    assert not re.search("<(script|link|img|iframe)", page)
    names, *figures, of_differing, rank = rows_of(page)[:6]
    assert names == ["", "done", "running"]
    assert ["loss/test", "3.2000", "-"] in figures
    assert ["num_parameters.trainable", "1,370,000", "-"] in figures
    assert [of_differing, rank] == [["key", "done", "running"], ["method.rank", "8", "16"]]
    assert ["training.steps", "60"] in rows_of(page)


def test_hostile_text_adds_no_element(tmp_path):
    run = write_run(tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"run"', f"'{HOSTILE}'"))
    page = page_of({HOSTILE: run}, tmp_path)
    assert "<script" not in page
    # The run's label, and its name.
    assert page.count(escape("<script>alert(")) >= 2


def test_a_damaged_file_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text('{"step": ')
    with pytest.raises(ConfigError, match=r"run: cannot be read: Expecting value"):
        write_page({"run": run}, {}, tmp_path / "page.html")
