"""A run that is stopped at a loss spike resumes from before it, and ends as without the stop."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_report import record
from support.interrupted_runs import Outcome, arguments, check_folders, newest_step, outcome
from support.kills import Kill, run
from support.spikes import BAD_BATCH, PASSED_OVER, raise_loss_of_batch, results_of

from switchtitan.training.stepper import Stepper
from switchtitan.training.trainer import Trainer

# Between two saves, nothing reads losses.
KEYS = ("--checkpoint.interval", "5", "--evaluation.interval", "100", "--metrics.interval", "100")
KEYS += ("--loss_spike.factor", "12", "--loss_spike.window", "8")
SPIKE_AT, BEFORE_SPIKE = BAD_BATCH + 1, 10
"""The step of the spike, and that of the last checkpoint before it."""
STOPS = {
    "found by the stop": (1, Kill("training", SPIKE_AT, delay_s=0.0, number=signal.SIGTERM)),
    "in progress": (2, Kill("rollback", 1, delay_s=0.0, rank=1, number=signal.SIGTERM)),
}
"""Ranks and moment of a stop; by the rollback."""


def raise_a_loss() -> None:
    """Plants a spike."""
    initialize = Stepper.__init__

    def initialize_with_a_spike(stepper: Stepper, *args: object, **keys: object) -> None:
        initialize(stepper, *args, **keys)
        raise_loss_of_batch(stepper, BAD_BATCH)

    Stepper.__init__ = initialize_with_a_spike


def raise_a_loss_and_save_it() -> None:
    """A planted fault: a stop does not look for spikes."""
    raise_a_loss()
    stop = Trainer._save_and_stop

    def stop_without_reading_losses(trainer: Trainer, number: int) -> None:
        trainer._has_rolled_back = lambda: False
        stop(trainer, number)

    Trainer._save_and_stop = stop_without_reading_losses


def stop_at_the_spike(folder: Path, rollback: str, plant: Callable[[], None]) -> None:
    """Stops a run in a rollback; checks that it has stopped before the spike."""
    num_ranks, stop = STOPS[rollback]
    log = folder / "log"
    codes = run([*arguments(folder, is_async=False), *KEYS], num_ranks, log, stop, plant)
    printed = log.read_text()
    assert codes == [128 + stop.number] * num_ranks, printed
    assert "Traceback" not in printed
    check_folders(folder)
    assert BEFORE_SPIKE <= newest_step(folder) < SPIKE_AT, printed
    assert f"loss spike at step {SPIKE_AT}" in printed
    assert "rolled back to" in printed
    assert f"stopped at step {newest_step(folder)}; the same command resumes from" in printed


def finish(folder: Path, num_ranks: int) -> Outcome:
    """Trains to the end."""
    own = [*arguments(folder, is_async=False), *KEYS]
    assert run(own, num_ranks, folder / "log", plant=raise_a_loss) == [0] * num_ranks
    results = results_of(folder)
    assert (results["rollbacks"], results["batches_passed_over"]) == (1, PASSED_OVER)
    return outcome(folder)


@pytest.mark.parametrize("rollback", STOPS)
def test_a_run_that_is_stopped_in_a_rollback_ends_as_without_the_stop(
    rollback: str, tmp_path: Path
) -> None:
    num_ranks, _ = STOPS[rollback]
    stop_at_the_spike(tmp_path / "stopped", rollback, raise_a_loss)
    stopped = finish(tmp_path / "stopped", num_ranks)
    undisturbed = finish(tmp_path / "undisturbed", num_ranks)
    assert stopped.tensors == undisturbed.tensors
    assert stopped.train_state == undisturbed.train_state
    record("stops", phase=f"rollback {rollback}", num_ranks=num_ranks, stops=1, SIGTERM=1)


def test_a_stop_that_saves_the_spike_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"assert {SPIKE_AT} < {SPIKE_AT}"):
        stop_at_the_spike(tmp_path, "found by the stop", raise_a_loss_and_save_it)
