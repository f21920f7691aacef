"""`switchtitan report`: reports of runs and of a comparison, and mistakes that are refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.commands import run
from support.reported import write_run


def contents_of(file: Path) -> dict[str, Any]:
    (text,) = re.findall(r'id="contents">(.*?)</script>', file.read_text(), re.DOTALL)
    return json.loads(text)


def test_runs_become_one_file(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    output = tmp_path / "out" / "page.html"
    done = run("report", *folders, "--output", output)
    assert (done.status, done.output) == (0, f"{output}\n")
    assert [of["name"] for of in contents_of(output)["series"]] == ["one", "two"]
    assert [file.name for file in output.parent.iterdir()] == ["page.html"]


def test_the_default_file_is_replaced_by_the_next_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "one")
    for _ in range(2):
        assert run("report", "one").output == "report.html\n"
    assert contents_of(tmp_path / "report.html")["title"] == "one"


def test_runs_of_one_name_are_named_by_their_paths(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name / "run") for name in ("one", "two")]
    run("report", *folders, "--output", tmp_path / "page.html")
    series = contents_of(tmp_path / "page.html")["series"]
    assert [of["name"] for of in series] == [str(folder) for folder in folders]


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "<" / "script><b>", name="</script><b>")
    (folder / "config.toml").write_text('[job]\nname = "x"\n[method]\nname = "</script><b>"')
    output = tmp_path / "page.html"
    assert run("report", folder, "--output", output).status == 0
    contents = contents_of(output)
    assert contents["title"] == "script><b>"
    assert "<b>" not in output.read_text()


def test_mistakes_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    output = tmp_path / "page.html"
    run("report", tmp_path / "missing", "--output", output).check_refused("missing: no such folder")
    (tmp_path / "empty").mkdir()
    run("report", good, tmp_path / "empty", "--output", output).check_refused(
        "empty: is not the folder of a run or of a comparison"
    )
    assert not output.exists()
    output.write_text("mine")
    run("report", good, "--output", output).check_refused("is not a report of switchtitan")
    assert output.read_text() == "mine"
    run("report", good, "--output", tmp_path).check_refused("is a folder")


def test_a_mistake_leaves_the_older_report(tmp_path: Path) -> None:
    good, output = write_run(tmp_path / "good"), tmp_path / "page.html"
    assert run("report", good, "--output", output).status == 0
    before = output.read_bytes()
    run("report", tmp_path / "missing", "--output", output).check_refused("no such folder")
    assert output.read_bytes() == before
