"""Damaged files of runs and comparisons give a report that names them, or one message."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fuzzing import FuzzError, fuzz, num_cases
from support.mutations import mutate_bytes, mutate_json
from support.reported import finish_comparison, write_grid, write_run

from switchtitan.report import run_files
from switchtitan.report.comparison_files import read_comparison
from switchtitan.report.comparison_report import comparison_report
from switchtitan.report.page import render
from switchtitan.report.run_files import read_run
from switchtitan.report.run_report import run_report
from switchtitan.spectra.spectra_files import write_spectra

PROFILE = {
    "rank": 0,
    "num_steps": 2,
    "step_ms": 7.0,
    "regions": {"forward": {"num_calls": 2, "host_ms": 3.0, "device_ms": 0.0}},
    "operations": [{"name": "aten::mm", "num_calls": 4, "self_ms": 5.0, "share": 0.7}],
}
JSON_FILES = ("results.json", "tensorboard/profile_summary.json")
OTHER_FILES = ("config.toml", "spectra/step-000000005.safetensors", "tensorboard/events")


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with every file that a report reads."""
    folder = write_run(tmp_path_factory.mktemp("valid"))
    (folder / "tensorboard" / "profile_summary.json").write_text(json.dumps([PROFILE]))
    write_spectra(folder / "spectra", 5, {"a.q_proj": torch.tensor([2.0, 1.0])})
    return folder


@pytest.fixture
def copy(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / "run"))


def damage(valid: Path, copy: Path, name: str) -> Callable[[random.Random], str]:
    """Returns a function that damages one file of the copy, and restores the others."""
    if name == "tensorboard/events":
        (file,) = (valid / "tensorboard").glob("*tfevents*")
        name = str(file.relative_to(valid))

    def damage(draw: random.Random) -> str:
        data = (valid / name).read_bytes()
        if name in JSON_FILES and draw.random() < 0.7:
            text = mutate_json(json.loads(data), draw)
            data = text.encode("utf-8", "surrogatepass")
        else:
            data = mutate_bytes(data, draw)
        (copy / name).write_bytes(data)
        return name

    return damage


@pytest.mark.parametrize("name", [*JSON_FILES, *OTHER_FILES])
def test_a_run_with_a_damaged_file(valid: Path, copy: Path, name: str) -> None:
    num_noted = 0

    def use() -> None:
        nonlocal num_noted
        run = read_run(copy)
        render(run_report({"run": run}))
        num_noted += bool(run.notes)

    cases = range(num_cases(600, 25))
    fuzz(f"report: {name}", damage(valid, copy, name), use, cases, min_refused=0.0)
    # Otherwise the cases were all valid.
    assert num_noted >= 0.2 * len(cases)


def test_a_comparison_with_damaged_results(tmp_path: Path) -> None:
    folder = finish_comparison(write_grid(tmp_path))
    file = folder / "results.json"
    data = json.loads(file.read_text())

    def damage(draw: random.Random) -> str:
        text = mutate_json(data, draw)
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        return text[:200]

    def use() -> None:
        render(comparison_report(read_comparison(folder)))

    fuzz("report: comparison", damage, use, range(num_cases(600, 10)), min_refused=0.1)


def test_an_unchecked_value_would_be_found(
    valid: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(file: Path, kind: object, notes: list[str]) -> object:
        return json.loads(file.read_text())

    monkeypatch.setattr(run_files, "_read_json", unchecked)
    with pytest.raises(FuzzError):
        fuzz(
            "report: planted fault",
            damage(valid, copy, "results.json"),
            lambda: read_run(copy),
            range(30),
        )
