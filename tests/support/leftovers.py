"""What steps of training leave to the garbage collection."""

import gc
from itertools import pairwise

import torch

from support.tiny import train_steps
from switchtitan.training.trainer import Trainer


def num_tensors() -> int:
    """Tensors that Python knows of, garbage included."""
    # Not isinstance, which asks weak proxies for the class of what they stood for.
    return sum(issubclass(type(entry), torch.Tensor) for entry in gc.get_objects())


def least_growth(counts: list[int]) -> int:
    """The least difference of two that follow each other: what a process makes once and keeps is no
    garbage, but what is left in every stretch is."""
    return min(after - before for before, after in pairwise(counts))


def tensors_left_by_fifteen_steps(trainer: Trainer) -> int:
    """How many more there are after them, while nothing is collected, in the better of two
    stretches."""
    train_steps(trainer, 2)
    gc.collect()
    gc.disable()
    try:
        counts = [num_tensors()]
        for _ in range(2):
            train_steps(trainer, 15)
            counts.append(num_tensors())
        return least_growth(counts)
    finally:
        gc.enable()
        trainer.stepper.close()
