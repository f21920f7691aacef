"""The loss around a point in weight space, and between two.

The loss is any function of weights by name, so that what is computed here does not depend on
models."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
"""A point or a direction in weight space. A direction may lack weights, which stay as they are."""
Loss = Callable[[Weights], float]


def expected_sharpness(
    loss: Loss, weights: Weights, direction: Weights, offsets: Sequence[float], loss_here: float
) -> float:
    """Returns the mean, over offsets e, of (L(w + e d) + L(w - e d)) / 2 - L(w).

    For a quadratic loss with Hessian H it is mean(e^2) d^T H d / 2. Calls `loss` twice for each
    offset.

    Args:
        loss_here: L(w).
    """
    rises = [
        (loss(moved(weights, direction, offset)) + loss(moved(weights, direction, -offset))) / 2
        - loss_here
        for offset in offsets
    ]
    return sum(rises) / len(rises)


class Barrier(NamedTuple):
    """The loss on the straight line between two points."""

    height: float
    """max over a of L(a) - ((1 - a) L(0) + a L(1)), on the grid."""
    position: float
    """The a of the maximum."""
    positions: list[float]
    """All a, from 0 to 1, ends included."""
    losses: list[float]
    """L(a) at `positions`."""


def barrier(loss: Loss, first: Weights, second: Weights, num_points: int) -> Barrier:
    """Returns how far the loss between two points rises above the chord between their losses.

    The maximum is over `num_points` evenly spaced a inside (0, 1); an odd number holds the middle.
    It is negative if the loss stays below the chord, as a strictly convex one does. Calls `loss`
    `num_points + 2` times.

    arXiv 2605.13652 subtracts (L(0) + L(1)) / 2 instead, which also counts a part of the
    difference between L(0) and L(1) as barrier; `losses` has what that form needs.
    """
    positions = [index / (num_points + 1) for index in range(num_points + 2)]
    losses = [loss(between(first, second, position)) for position in positions]
    heights = [
        value - ((1 - position) * losses[0] + position * losses[-1])
        for position, value in zip(positions, losses, strict=True)
    ]
    highest = max(range(1, num_points + 1), key=heights.__getitem__)
    return Barrier(heights[highest], positions[highest], positions, losses)


def moved(weights: Weights, direction: Weights, offset: float) -> dict[str, Tensor]:
    """Returns w + offset * d."""
    return {
        name: torch.add(weight, direction[name], alpha=offset) if name in direction else weight
        for name, weight in weights.items()
    }


def between(first: Weights, second: Weights, position: float) -> dict[str, Tensor]:
    """Returns (1 - position) * first + position * second; the ends are exact."""
    return {name: torch.lerp(weight, second[name], position) for name, weight in first.items()}


def norm_of(weights: Weights) -> float:
    """Returns the norm of all weights together, as one vector."""
    squares = [weight.double().square().sum() for weight in weights.values()]
    return torch.stack(squares).sum().sqrt().item()
