"""Non-finite gradients."""

import math
from typing import Any

import torch

from switchtitan.training.stepper import Stepper


def spoil_next_gradient(stepper: Stepper) -> None:
    """Makes only the next micro-batch's loss inf, like an overflow."""
    loss = stepper.loss

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        stepper.loss = loss
        return loss(*args, **kwargs) * math.inf

    stepper.loss = overflowing
