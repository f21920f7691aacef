"""An evaluation that a stop abandons leaves nothing; the resumed run does it as if undisturbed."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import full_tensors, tiny_trainer
from torch import Tensor

from switchtitan.distributed.world import stop_world
from switchtitan.observability.curves import read_curves
from switchtitan.training.evaluate import EvaluationStopped
from switchtitan.training.stepper import TrainState
from switchtitan.training.stop import NeverStop, Stopped
from switchtitan.training.trainer import Trainer, loss_metrics

INTERVAL, STOPPED_AT, NUM_STEPS = 4, 8, 12
KEYS = ("--training.steps", str(NUM_STEPS), "--evaluation.interval", str(INTERVAL))
KEYS += ("--metrics.tensorboard", "true", "--checkpoint.interval", "100")
VALIDATION = tuple(loss_metrics("validation", 1.0))
MEASURED = ("throughput/", "memory/", "time/")
"""What depends on the machine."""


class StopInTheEvaluation(NeverStop):
    """Stops a run after the third batch of an evaluation."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._num_batches = 0

    def is_due(self) -> int | None:
        # The state says so until all work after the step is done.
        self._num_batches += self._state.is_work_after_step_due
        is_there = self._state.step == STOPPED_AT and self._num_batches % 5 == 3
        return signal.SIGTERM if is_there else None


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Points by tag, without what depends on the machine."""
    return {
        tag: list(zip(*curve, strict=True))
        for tag, curve in read_curves(folder / "run").items()
        if not tag.startswith(MEASURED)
    }


def results(folder: Path) -> dict[str, Any]:
    losses = json.loads((folder / "run" / "results.json").read_text())
    return {name: value for name, value in losses.items() if name.startswith("loss/")}


def finish(folder: Path) -> tuple[dict[str, Tensor], TrainState]:
    """Trains to the end."""
    trainer = tiny_trainer(folder, "switchlora", *KEYS)
    trainer.train()
    tensors = full_tensors(trainer)
    stop_world()
    return tensors, trainer.stepper.state


@pytest.fixture(scope="module")
def undisturbed(corpora: Path) -> tuple[Path, dict[str, Tensor], TrainState]:
    folder = corpora / "undisturbed-evaluation"
    return folder, *finish(folder)


def stop_in_the_evaluation(folder: Path, plant: Callable[[Trainer], None] = lambda _: None) -> None:
    """Stops a run; checks that the abandoned evaluation has left nothing."""
    trainer = tiny_trainer(folder, "switchlora", *KEYS)
    trainer.stop = StopInTheEvaluation(trainer.stepper.state)
    plant(trainer)
    with pytest.raises(Stopped):
        trainer.train()
    stop_world()
    assert (folder / "run" / "checkpoints" / f"step-{STOPPED_AT:09d}").is_dir()
    assert not (folder / "run" / "results.json").exists()
    left = curves(folder)
    assert left["loss/train"][-1][0] == STOPPED_AT
    for tag in VALIDATION:
        assert [step for step, _ in left[tag]] == [0, INTERVAL]


def check_same_as(
    undisturbed: tuple[Path, dict[str, Tensor], TrainState], resumed_in: Path
) -> None:
    """Resumes a run, and compares all that it leaves."""
    folder, expected, state = undisturbed
    tensors, resumed_state = finish(resumed_in)
    assert curves(resumed_in) == curves(folder)
    assert results(resumed_in) == results(folder)
    assert resumed_state == state
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_an_abandoned_evaluation_leaves_nothing_and_is_done_by_the_resumed_run(
    corpora, undisturbed
):
    folder = corpora / "abandoned"
    stop_in_the_evaluation(folder)
    check_same_as(undisturbed, folder)


def report_what_was_evaluated(trainer: Trainer) -> None:
    """A planted fault."""
    evaluate = trainer.evaluate

    def planted() -> None:
        try:
            evaluate()
        except EvaluationStopped:
            trainer.reporter.report(trainer.stepper.state.step, loss_metrics("validation", 5.0))
            raise

    trainer.evaluate = planted


def test_a_half_written_evaluation_is_found(corpora):
    with pytest.raises(AssertionError, match=r"\[0, 4, 8\] == \[0, 4\]"):
        stop_in_the_evaluation(corpora / "half-written", report_what_was_evaluated)


def forget_the_evaluation(trainer: Trainer) -> None:
    """A planted fault."""
    save = trainer.save

    def planted() -> None:
        trainer.stepper.state.is_work_after_step_due = False
        save()

    trainer.save = planted


def test_an_evaluation_that_the_resumed_run_does_not_repeat_is_found(corpora, undisturbed):
    folder = corpora / "forgotten"
    stop_in_the_evaluation(folder, forget_the_evaluation)
    with pytest.raises(AssertionError, match="loss/validation"):
        check_same_as(undisturbed, folder)
