"""Gradients that are not finite."""

import math
from typing import Any

import torch

from switchtitan.training.stepper import Stepper


def spoil_next_gradient(stepper: Stepper) -> None:
    """Makes the loss of the next micro-batch inf, as an overflow would, and those after it as they
    are."""
    loss = stepper.loss

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        stepper.loss = loss
        return loss(*args, **kwargs) * math.inf

    stepper.loss = overflowing
