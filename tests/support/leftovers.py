"""Counts tensors that training steps leave to the garbage collector."""

import gc
from itertools import pairwise

import torch

from support.tiny import train_steps
from switchtitan.training.trainer import Trainer


def num_tensors() -> int:
    """Number of tensors that Python tracks, including garbage."""
    # Not isinstance, which asks weak proxies for the class of their referent.
    return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())


def least_growth(counts: list[int]) -> int:
    """Least difference of consecutive counts: tensors created once and kept are not garbage."""
    return min(after - before for before, after in pairwise(counts))


def tensors_left(trainer: Trainer, num_steps: int) -> int:
    """Number of tensors left by steps without garbage collection: the minimum of two runs."""
    train_steps(trainer, 2)
    gc.collect()
    gc.disable()
    try:
        counts = [num_tensors()]
        for _ in range(2):
            train_steps(trainer, num_steps)
            counts.append(num_tensors())
        return least_growth(counts)
    finally:
        gc.enable()
