"""A run that ends after a failed save saves its last step again, or says that it is lost."""

import errno
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_trainer

from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents
from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError
from switchtitan.training.stop import NeverStop, Stopped
from switchtitan.training.trainer import Trainer

INTERVAL, STOPPED_AT, NUM_STEPS = 2, 4, 6
KEYS = ("--training.steps", str(NUM_STEPS), "--checkpoint.interval", str(INTERVAL))
KEYS += ("--checkpoint.on_failure", "continue", "--checkpoint.async_save")


class StopAfter(NeverStop):
    """A signal arrives in a step."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self._state = trainer.stepper.state
        self._step = step

    def is_due(self) -> int | None:
        return signal.SIGTERM if self._state.step == self._step else None


class SignalAfterLastStep(NeverStop):
    def steps(self, describe_checkpoint: Callable[[], str]) -> AbstractContextManager[None]:
        @contextmanager
        def context() -> Iterator[None]:
            yield
            raise KeyboardInterrupt(signal.SIGTERM)

        return context()


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.fixture
def fail_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the writes of some saves fail; saves are counted from 1."""

    def plant(*failing: int) -> None:
        write_data, num_saves = ChecksummingWriter.write_data, 0

        def write(*arguments: Any) -> Any:
            nonlocal num_saves
            num_saves += 1
            if num_saves in failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write_data(*arguments)

        monkeypatch.setattr(ChecksummingWriter, "write_data", write)

    return plant


def build(folder: Path, is_async: str, stop_after: int | None = None) -> Trainer:
    trainer = tiny_trainer(folder, "switchlora", *KEYS, is_async)
    if stop_after is not None:
        trainer.stop = StopAfter(trainer, stop_after)
    return trainer


def check_saved(folder: Path, step: int) -> None:
    newest = max((folder / "run" / "checkpoints").iterdir())
    assert check_contents(newest).step == step


@pytest.mark.parametrize("is_async", ["false", "true"])
@pytest.mark.parametrize("step", [STOPPED_AT, STOPPED_AT + 1])
def test_a_stop_after_a_failed_save_saves_the_step(corpora, fail_saves, is_async, step):
    folder = corpora / f"stopped-{is_async}-{step}"
    trainer = build(folder, is_async, stop_after=step)
    fail_saves(2)
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.checkpointer.num_failed_saves == 1
    check_saved(folder, step)


def test_a_stop_whose_save_fails_again_is_an_error_that_names_the_checkpoint(corpora, fail_saves):
    folder = corpora / "failed-again"
    trainer = build(folder, "false", stop_after=STOPPED_AT)
    fail_saves(2, 3)
    with pytest.raises(
        CheckpointError,
        match=rf"the last checkpoint was not saved, the same command resumes from .*{INTERVAL}: "
        rf"cannot save step {STOPPED_AT} .*No space left",
    ):
        trainer.train()
    check_saved(folder, INTERVAL)


def test_a_stop_after_a_save_saves_nothing_again(corpora, fail_saves):
    folder = corpora / "saved"
    trainer = build(folder, "false", stop_after=STOPPED_AT)
    fail_saves(3)
    with pytest.raises(Stopped):
        trainer.train()
    assert trainer.checkpointer.num_failed_saves == 0
    check_saved(folder, STOPPED_AT)


@pytest.mark.parametrize("is_async", ["false", "true"])
def test_the_last_step_is_saved_again(corpora, fail_saves, is_async):
    folder = corpora / f"last-step-{is_async}"
    trainer = build(folder, is_async)
    fail_saves(3)
    trainer.train()
    assert trainer.checkpointer.num_failed_saves == 1
    check_saved(folder, NUM_STEPS)


def test_a_signal_after_a_last_step_that_could_not_be_saved_is_an_error(corpora, fail_saves):
    trainer = build(corpora / "signal-after-last", "false")
    trainer.stop = SignalAfterLastStep()
    fail_saves(3, 4)
    with pytest.raises(CheckpointError, match="the last checkpoint was not saved"):
        trainer.train()


def test_a_failed_save_that_counts_as_saved_is_found(corpora, fail_saves, monkeypatch):
    """The checks above can fail."""
    monkeypatch.setattr(Trainer, "_is_saved", True)
    folder = corpora / "counts-as-saved"
    trainer = build(folder, "false", stop_after=STOPPED_AT)
    fail_saves(2)
    with pytest.raises(Stopped):
        trainer.train()
    with pytest.raises(AssertionError, match=f"== {STOPPED_AT}"):
        check_saved(folder, STOPPED_AT)
