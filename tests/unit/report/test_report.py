"""The page of runs: figures as written, keys that differ, and text that stays text."""

import json
from html.parser import HTMLParser

import pytest
from support.comparisons import write_curves

from switchtitan.errors import ConfigError
from switchtitan.report.curves import draw_curves
from switchtitan.report.page import read_run, write_page

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


class Tables(HTMLParser):
    """All cells of a page's tables, [table][row][cell], and the names of all elements."""

    def __init__(self, page):
        super().__init__()
        self.names, self.tables = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.tables and self.names[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data.strip()


def page_of(folders, tmp_path):
    runs = {label: read_run(folder) for label, folder in folders.items()}
    figure = draw_curves({label: run.curves for label, run in runs.items()})
    write_page(runs, {"Curves": (figure, None)}, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_page_has_results_curves_and_the_keys_that_differ(tmp_path):
    running = write_run(tmp_path / "running", rank=16)
    (running / "results.json").unlink()
    page = page_of({"done": write_run(tmp_path / "done"), "running": running}, tmp_path)
    assert page.count("<svg") == 1
    elements = Tables(page)
    # Nothing that a browser would load.
    assert not {"script", "link", "img", "iframe"} & set(elements.names)
    results, differing, same = elements.tables
    done = dict(zip(results[0], results[1], strict=True))
    assert done["loss/test"] == "3.2000"
    assert done["num_parameters.trainable"] == "1,370,000"
    assert results[2][1:] == ["-"] * (len(results[0]) - 1)
    assert differing == [["key", "done", "running"], ["method.rank", "8", "16"]]
    assert ["training.steps", "60"] in same


def test_hostile_text_adds_no_element(tmp_path):
    run = write_run(tmp_path / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('"run"', f"'{HOSTILE}'"))
    hostile = Tables(page_of({HOSTILE: run}, tmp_path))
    assert "script" not in hostile.names
    assert hostile.tables[0][1][0] == HOSTILE
    (name,) = [row for row in hostile.tables[-1] if row[0] == "job.name"]
    assert "<script>" in name[1]


def test_a_damaged_file_is_named(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text('{"step": ')
    with pytest.raises(ConfigError, match=r"run: cannot be read: Expecting value"):
        read_run(run)
