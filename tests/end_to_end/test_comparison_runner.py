"""The processes that train the runs of a comparison."""

import threading
import time

import pytest

from switchtitan.comparison.plan import Run
from switchtitan.comparison.runner import RunFailedError, Runner
from switchtitan.files import try_lock


def run_in(folder, *arguments):
    return Run("row", (("optimizer.lr", 0.1),), 1, folder, arguments)


def test_a_failed_run_stops_the_comparison_and_shows_what_it_printed(tmp_path):
    run = run_in(tmp_path / "run", "--config", "nowhere.toml")
    with pytest.raises(RunFailedError, match=r"(?s)status 2 .*output.txt .*nowhere.toml"):
        Runner(1).run_all([run], lambda run: False, lambda run: None)
    with try_lock(run.folder / "lock", key="output_dir") as lock:
        assert lock is not None, "the failed run's process must have released the lock"


def test_the_runner_waits_for_a_run_that_another_process_trains(tmp_path):
    run, results, finished = run_in(tmp_path / "run"), tmp_path / "results", []
    is_held = threading.Event()

    def train_elsewhere():
        with try_lock(run.folder / "lock", key="output_dir"):
            is_held.set()
            time.sleep(1.2)
            results.touch()

    other = threading.Thread(target=train_elsewhere)
    other.start()
    assert is_held.wait(10)
    Runner(1).run_all([run], lambda run: results.exists(), finished.append)
    other.join()
    assert finished == [run]
    assert not (run.folder / "output.txt").exists()
