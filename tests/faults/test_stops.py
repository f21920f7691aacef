"""Stopped by signals at any moments, the same command loses no step and changes no bit."""

import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
from support.fault_report import IS_LONG, record
from support.interrupted_runs import (
    NUM_STEPS,
    Outcome,
    arguments,
    check_folders,
    newest_step,
    outcome,
    steps_in,
)
from support.kills import Kill, run

from switchtitan.training.stop import RunStop
from switchtitan.training.trainer import Trainer

PHASES = {
    "sync": ("evaluation", "save", "training", "start-up"),
    "async": ("start-up", "save", "evaluation", "training"),
}
"""Phases in which the runs of a chain are stopped, with saves that block training, and with saves
in the background."""
NUM_STOPS = {1: 4, 2: 3, 4: 3}
"""Stops of a chain, by the number of ranks."""
CHAINS = [(num_ranks, saves) for num_ranks in NUM_STOPS for saves in PHASES]
if not IS_LONG:
    CHAINS, NUM_STOPS = [(2, "async")], {2: 2}
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONGEST_S = {"start-up": 0.4, "training": 0.05, "evaluation": 0.1, "save": 0.1}
"""About how long a phase lasts."""
MAX_RUNS = 12
"""A run is not stopped if it does not reach the drawn moment."""


def stop_arguments(folder: Path, saves: str) -> list[str]:
    """The arguments of a run that evaluates and saves at different steps, which take longer than
    the ranks need to agree on where to stop."""
    keys = ("--evaluation.interval", "3", "--evaluation.tokens", "640")
    return [*arguments(folder, is_async=saves == "async"), *keys, "--job.stop_signal", "SIGUSR1"]


def check_stop(
    folder: Path,
    stop: Kill,
    codes: list[int],
    printed: str,
    step_before: int,
) -> list[int]:
    """Checks a run that received a signal; returns the step that it has lost, if any.

    A run that gets the signal before the end of its first step stops at once. That step may end
    while the ranks agree on this; it is lost, and the only one that may be.

    Args:
        codes: exit statuses of all ranks.
        printed: by rank 0.
        step_before: the step from which the run resumed.
    """
    assert codes == [128 + stop.number] * len(codes), printed
    assert "Traceback" not in printed
    assert not (folder / "run" / "run.lock").exists()
    check_folders(folder)
    steps = steps_in(printed)
    last_step = step_before + len(steps)
    assert steps == list(range(step_before + 1, last_step + 1))
    is_before_first_step = stop.phase == "start-up" or (stop.phase, stop.call) == ("training", 1)
    if is_before_first_step and len(steps) == 1 and "stopped at step" not in printed:
        assert newest_step(folder) == step_before, printed
        return steps
    assert newest_step(folder) == last_step, printed
    if steps and last_step < NUM_STEPS:
        assert f"stopped at step {last_step}; the same command resumes from" in printed
    return []


def random_stop(source: random.Random, phase: str, num_ranks: int) -> Kill:
    calls = {"training": 5, "evaluation": 2}
    return Kill(
        phase,
        # The evaluation before the first step is a part of the start.
        call=source.randint(1, calls.get(phase, 1)) + (phase == "evaluation"),
        delay_s=source.uniform(0, LONGEST_S[phase]),
        rank=source.choice([None, *range(num_ranks)]),
        number=source.choice(SIGNALS),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Outcome]:
    """The outcome for a number of ranks."""

    @lru_cache
    def outcome_on(num_ranks: int) -> Outcome:
        folder = tmp_path_factory.mktemp("undisturbed")
        codes = run(stop_arguments(folder, "sync"), num_ranks, folder / "log")
        assert codes == [0] * num_ranks
        return outcome(folder)

    return outcome_on


@pytest.mark.parametrize(("num_ranks", "saves"), CHAINS)
def test_a_stopped_run_loses_no_step_and_ends_as_if_it_had_not_been_stopped(
    undisturbed: Callable[[int], Outcome], num_ranks: int, saves: str, tmp_path: Path
) -> None:
    source = random.Random(f"{num_ranks} {saves}")
    own, log = stop_arguments(tmp_path, saves), tmp_path / "log"
    stopped: list[tuple[str, int]] = []
    lost: list[int] = []
    for _ in range(MAX_RUNS):
        phase = PHASES[saves][len(stopped)]
        stop = random_stop(source, phase, num_ranks)
        step_before, size = newest_step(tmp_path), log.stat().st_size if log.exists() else 0
        codes = run(own, num_ranks, log, stop)
        printed = log.read_text()[size:]
        if codes == [0] * num_ranks:  # otherwise nothing would be left to do
            shutil.rmtree(tmp_path / "run")
            log.unlink()
            lost.clear()
            continue
        lost += check_stop(tmp_path, stop, codes, printed, step_before)
        stopped.append((phase, stop.number))
        if len(stopped) == NUM_STOPS[num_ranks]:
            break
    assert len(stopped) == NUM_STOPS[num_ranks]
    assert run(own, num_ranks, log) == [0] * num_ranks
    assert steps_in(log.read_text()) == sorted([*range(1, NUM_STEPS + 1), *lost])
    assert outcome(tmp_path) == undisturbed(num_ranks)
    for phase, number in stopped:
        name = "background save" if (phase, saves) == ("save", "async") else phase
        by_signal = {known.name: int(known == number) for known in SIGNALS}
        record("stops", phase=name, num_ranks=num_ranks, stops=1, **by_signal)


@pytest.mark.parametrize("rank", [0, 3] if IS_LONG else [0])
def test_all_ranks_learn_of_a_stop_before_the_first_step(rank: int, tmp_path: Path) -> None:
    """Rank 0 holds the store by which ranks tell each other."""
    stop = Kill("start-up", call=1, delay_s=0.1, rank=rank, number=signal.SIGTERM)
    log = tmp_path / "log"
    codes = run(stop_arguments(tmp_path, "sync"), 4, log, stop)
    check_stop(tmp_path, stop, codes, log.read_text(), step_before=0)


def end_first_step_while_ranks_agree() -> None:
    """The signal is known before the first step counts, and the answer after it was reported."""
    note_step, agree = RunStop.note_step, RunStop._agree

    def wait_until(claim: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not claim() and time.monotonic() < deadline:
            time.sleep(0.01)

    def note_when_asked(stop: RunStop) -> None:
        wait_until(lambda: stop._hold < math.inf)
        note_step(stop)

    def agree_after_step(stop: RunStop, stop_at: float, has_work: bool) -> None:
        wait_until(lambda: stop._num_passed > 0)
        agree(stop, stop_at, has_work)

    RunStop.note_step, RunStop._agree = note_when_asked, agree_after_step


def test_a_first_step_that_ends_while_the_ranks_agree_is_the_only_one_lost(tmp_path: Path) -> None:
    stop = Kill("training", call=1, delay_s=0.0, number=signal.SIGTERM)
    log, own = tmp_path / "log", stop_arguments(tmp_path, "sync")
    codes = run(own, 2, log, stop, end_first_step_while_ranks_agree)
    printed = log.read_text()
    assert check_stop(tmp_path, stop, codes, printed, step_before=0) == [1]
    with pytest.raises(AssertionError):  # a later step must be saved
        check_stop(tmp_path, replace(stop, call=2), codes, printed, step_before=0)


def save_nothing_at_a_stop() -> None:
    """A planted fault."""
    stop = Trainer._save_and_stop

    def stop_without_saving(trainer: Trainer, number: int) -> None:
        trainer.save = lambda: None
        stop(trainer, number)

    Trainer._save_and_stop = stop_without_saving


def test_a_stop_that_saves_nothing_is_found(tmp_path: Path) -> None:
    stop = Kill("training", call=2, delay_s=0.0, number=signal.SIGTERM)
    log = tmp_path / "log"
    codes = run(stop_arguments(tmp_path, "sync"), 1, log, stop, save_nothing_at_a_stop)
    with pytest.raises(AssertionError, match="stopped at step"):
        check_stop(tmp_path, stop, codes, log.read_text(), step_before=0)
