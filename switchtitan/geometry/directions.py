"""Directions in weight space along which sharpness is measured."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.distributed.random import generator_for
from switchtitan.geometry.landscape import Weights, norm_of


def perturbed_names(weights: Weights) -> list[str]:
    """Returns the weights that directions change: matrices, so embedding, linear layers and head.

    Norms and biases stay as they are, as in "Visualizing the Loss Landscape of Neural Nets" (arXiv
    1712.09913, section 4).
    """
    return [name for name, weight in weights.items() if weight.ndim >= 2]


def random_direction(weights: Weights, seed: int, number: int) -> dict[str, Tensor]:
    """Returns a random direction: each matrix is Gaussian, scaled to the norm of the weight.

    So an offset of 0.01 moves each matrix by 1 % of its norm. It is the normalization of arXiv
    1712.09913, section 4, for each tensor instead of each filter. Runs of one model get the same
    direction, up to the scale of each matrix.

    Args:
        number: of the direction; others are independent.
    """
    direction = {}
    for name in perturbed_names(weights):
        weight = weights[name]
        drawn = torch.randn(weight.shape, generator=generator_for(seed, f"{number}:{name}"))
        scale = weight.double().norm().item() / drawn.double().norm().item()
        direction[name] = drawn.mul_(scale).to(weight.device, weight.dtype)
    return direction


class PrincipalDirection(NamedTuple):
    """A principal direction of a sequence of points."""

    direction: dict[str, Tensor]
    """Of norm 1, all tensors together."""
    share: float
    """The share of the points' variance along it."""


def principal_directions(
    read: Callable[[str], Sequence[Tensor]], names: Sequence[str], count: int
) -> list[PrincipalDirection]:
    """Returns the top principal directions of points, such as a run's checkpoints, minus their
    mean.

    Decomposes the Gram matrix of the points [points, points], so that only one tensor of all
    points is in memory at a time. There are at most one fewer than points, and fewer if the points
    lie in a smaller space.

    Args:
        read: name -> this tensor of each point, in order; called twice for each name.
        names: the tensors to consider.
    """
    products, squares = [], 0.0
    for name in names:
        points = read(name)
        centred = _centred(points)
        products.append(centred @ centred.T)
        squares += points[0].double().square().sum().item()
    variances, vectors = torch.linalg.eigh(torch.stack(products).sum(0))
    variances, vectors = variances.flip(0).clamp(min=0), vectors.flip(1)
    # Points minus their mean have one dimension less. Of the others, some may be fp64 noise: fp32
    # weights that differ do so by more than 1e-12 of their norm.
    noise = max(1e-12 * variances[0].item(), 1e-24 * squares)
    count = min(count, int((variances[:-1] > noise).sum()))
    factors = (vectors[:, :count] / variances[:count].sqrt()).T
    parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in names:
        points = read(name)
        combined = factors @ _centred(points)
        for part, values in zip(parts, combined, strict=True):
            part[name] = values.view(points[0].shape).to(points[0].dtype)
    total = variances.sum().item()
    return [
        PrincipalDirection(part, variance / total)
        for part, variance in zip(parts, variances[:count].tolist(), strict=True)
    ]


def scaled_to_weights(direction: Weights, weights: Weights) -> dict[str, Tensor]:
    """Scales a direction as a whole to the norm of the weights that it changes.

    It then moves the weights as far as a random direction does, but keeps its shape.
    """
    scale = norm_of({name: weights[name] for name in direction}) / norm_of(direction)
    return {name: (part * scale).to(weights[name].device) for name, part in direction.items()}


def _centred(points: Sequence[Tensor]) -> Tensor:
    """Returns [points, numel] in fp64, minus the mean."""
    stacked = torch.stack([point.flatten() for point in points]).double()
    return stacked - stacked.mean(0)
