"""Losses and gradients that are not finite, and data without the batches that have them."""

import math
from collections.abc import Callable, Generator
from itertools import count
from typing import Any

import torch
from torch import Tensor

from switchtitan.contracts import Batch
from switchtitan.training.step import Stepper


def spoil_next_gradient(stepper: Stepper) -> None:
    """Makes only the next micro-batch's loss inf, like an overflow."""
    _change_next_loss(stepper, lambda loss: loss * math.inf)


def spoil_next_loss(stepper: Stepper) -> None:
    """Makes only the next micro-batch's loss nan; its gradient is finite."""
    _change_next_loss(stepper, lambda loss: loss + math.nan)


def spoil_batch(stepper: Stepper, index: int, spoil: Callable[[Stepper], None]) -> None:
    """Calls `spoil` before the first micro-batch of batch `index`, counted from the next one."""

    def spoiling(batches: Generator[list[Batch], None, None]) -> Generator:
        for number in count():
            batch = next(batches)
            if number == index:
                spoil(stepper)
            yield batch

    stepper.batches = spoiling(stepper.batches)


def leave_out_batch(stepper: Stepper, index: int) -> None:
    """Removes batch `index` from the data, counted from the next one."""

    def others(batches: Generator[list[Batch], None, None]) -> Generator:
        for number in count():
            batch = next(batches)
            if number != index:
                yield batch

    stepper.batches = others(stepper.batches)


def _change_next_loss(stepper: Stepper, change: Callable[[Tensor], Tensor]) -> None:
    loss = stepper.loss

    def changed(*args: Any, **kwargs: Any) -> torch.Tensor:
        stepper.loss = loss
        return change(loss(*args, **kwargs))

    stepper.loss = changed
