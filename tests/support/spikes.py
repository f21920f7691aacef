"""Runs with a loss spike."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from support.tiny import tiny_trainer
from switchtitan.training.stepper import Stepper, StepResult
from switchtitan.training.trainer import Trainer

RUN = ("--training.steps", "20", "--checkpoint.interval", "5", "--evaluation.interval", "100")
GUARD = (*RUN, "--loss_spike.factor", "12", "--loss_spike.window", "8")
BAD_BATCH, PASSED_OVER = 13, [12, 13]


def raise_loss_of_batch(stepper: Stepper, index: int) -> None:
    """Multiplies the loss of a batch of the data, and so its gradient, whenever it is read."""
    loss = stepper.loss

    def raised(*args: Any, **kwargs: Any) -> Tensor:
        value = loss(*args, **kwargs)
        return 3 * value if stepper.state.next_batch == index else value

    stepper.loss = raised


def run_without_batches(
    folder: Path, method: str, batches: Collection[int], *overrides: str, num_ranks: int = 1
) -> Trainer:
    """Trains to the end on data without some batches."""
    trainer = tiny_trainer(folder, method, *RUN, *overrides, num_ranks=num_ranks)
    reader = trainer.stepper.batches
    trainer.stepper.batches = (batch for index, batch in enumerate(reader) if index not in batches)
    trainer.train()
    return trainer


def stop_after(trainer: Trainer, num_steps: int) -> None:
    """Interrupts the run after a rollback, when it has taken this many steps."""
    step = trainer.stepper.step

    def stopping_step() -> StepResult:
        state = trainer.stepper.state
        if state.num_rollbacks and state.step == num_steps:
            raise KeyboardInterrupt
        return step()

    trainer.stepper.step = stopping_step


def results_of(folder: Path) -> dict[str, Any]:
    """Returns what `results.json` of a run in `folder` holds."""
    return json.loads((folder / "run" / "results.json").read_text())
