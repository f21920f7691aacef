"""The processes that train the runs of a comparison."""

import pytest

from switchtitan.comparison.plan import Run
from switchtitan.comparison.runner import RunFailedError, Runner


def run_in(folder, *arguments):
    return Run("row", (("optimizer.lr", 0.1),), 1, folder, arguments)


def test_a_failed_run_stops_the_comparison_and_shows_what_it_printed(tmp_path):
    runs = [run_in(tmp_path / name, "--config", "nowhere.toml") for name in ("one", "two", "three")]
    with pytest.raises(RunFailedError, match=r"(?s)status 2 .*output.txt .*nowhere.toml"):
        Runner(1).run_all(runs, lambda run: False, lambda run: None)
    assert not (tmp_path / "three").exists()
