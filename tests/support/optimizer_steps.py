"""Parameters and gradients for tests of optimizers, equal in every call."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from switchtitan.contracts import TrainingOptimizer

Shapes = Mapping[str, tuple[int, ...]]
"""By the parameter's name."""
NUM_STEPS = 12
_START = 1000


def draw(shapes: Shapes, step: int) -> list[Tensor]:
    """Returns a step's gradients."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in shapes.values()]


def parameters(shapes: Shapes) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(value) for name, value in zip(shapes, draw(shapes, _START), strict=True)
    }


def train(optimizer: TrainingOptimizer, named: dict[str, nn.Parameter], steps: range) -> None:
    """Takes steps with a learning rate that grows to its peak in step `NUM_STEPS`."""
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    for step in steps:
        optimizer.set_lr((step + 1) / NUM_STEPS)
        for parameter, gradient in zip(named.values(), draw(shapes, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()


def limit_elements_per_call(monkeypatch: Any, module: ModuleType, num_elements: int) -> None:
    """Makes the parts small in which uncompiled operations of a module take large tensors."""
    monkeypatch.setattr(module, "_MAX_ELEMENTS", num_elements)
