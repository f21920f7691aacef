"""`switchtitan compare` on several files: all are checked first, then each is run and reported."""

import shutil
from pathlib import Path

import pytest
from support.declared_comparison import GRID, write_grid
from support.reported import finish_comparison

from switchtitan.cli import compare


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two finished comparisons that share an `output_dir` and the runs that choose rates."""
    files = []
    for name, seeds in (("first", "[2, 3]"), ("second", "[4]")):
        grid = GRID.replace("report_seeds = [2, 3]", f"report_seeds = {seeds}")
        file = write_grid(tmp_path, grid.replace("max_widenings = 1", "max_widenings = 0"))
        files.append(file.rename(file.with_name(f"{name}.toml")))
        finish_comparison(files[-1])
    shutil.rmtree(tmp_path / "out" / "reports")
    return files


def run_compare(*arguments: object) -> None:
    compare.main([*map(str, arguments), "--report-only"])


def test_each_file_is_reported_in_order(files, capsys):
    run_compare(*files)
    reports = [files[0].parent / "out" / "reports" / name for name in ("first", "second")]
    assert capsys.readouterr().out.split() == [str(folder / "report.md") for folder in reports]
    num_lines = [len((folder / "runs.csv").read_text().splitlines()) for folder in reports]
    # Six runs choose rates of both, and three rows are reported on two seeds and on one.
    assert num_lines == [1 + 6 + 6, 1 + 6 + 3]


def test_all_files_are_checked_before_any_is_run(files, capsys):
    files[1].write_text(files[1].read_text().replace('baseline = "dense"', 'baseline = "dens"'))
    with pytest.raises(SystemExit) as stopped:
        run_compare(*files)
    assert stopped.value.code == 2
    assert "baseline = 'dens': expected one of" in capsys.readouterr().err
    assert not (files[0].parent / "out" / "reports").exists()


def test_two_files_with_one_report_folder_are_refused(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_compare(files[0], files[0])
    assert stopped.value.code == 2
    assert "another of these files has the same name and output_dir" in capsys.readouterr().err
