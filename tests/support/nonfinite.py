"""Losses and gradients that are not finite."""

import math

import torch

SKIP = ("--training.on_nonfinite", "skip")
# Both infinities; then nan as CUDA makes it, with its sign set, and as the CPU makes it.
_PATTERNS = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000]
NOT_FINITE = torch.tensor(_PATTERNS).int().view(torch.float32)


def spoil_next_gradient(stepper):
    """Makes only the next micro-batch's loss inf, like an overflow."""
    _change_next_loss(stepper, lambda loss: loss * math.inf)


def spoil_next_loss(stepper):
    """Makes only the next micro-batch's loss nan; its gradient is finite."""
    _change_next_loss(stepper, lambda loss: loss + math.nan)


def _change_next_loss(stepper, change):
    loss = stepper.loss

    def changed(*args, **kwargs):
        stepper.loss = loss
        return change(loss(*args, **kwargs))

    stepper.loss = changed
