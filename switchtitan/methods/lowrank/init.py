"""Initial values of the factors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

GAIN = 1 / math.sqrt(3)
"""The gain of a leaky ReLU with slope sqrt(5), as in Kaiming-uniform initialization of linear layers."""


def lora_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """A uniform on +-1/sqrt(in), B zero, W untouched (LoRA, arXiv 2106.09685, with Kaiming-uniform A, a = sqrt 5).

    Args:
        weight: [out, in], the plain layer's initial weight.

    Returns:
        `weight` [out, in], `lora_a` [rank, in], `lora_b` [rank, out].
    """
    out_features, in_features = weight.shape
    lora_a = uniform((rank, in_features), lora_bound(in_features), generator_for("lora_a"))
    return {"weight": weight, "lora_a": lora_a, "lora_b": torch.zeros(rank, out_features)}


def lora_bound(in_features: int) -> float:
    """Bound of the uniform distribution of LoRA's A: sqrt(6 / ((1 + a^2) in)) with a = sqrt 5, which is 1/sqrt(in)."""
    return 1 / math.sqrt(in_features)


def balanced_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Both factors random with `balanced_bounds`, and W := weight - s B A, so that the layer computes what `weight` does.

    Returns:
        As `lora_init`.
    """
    out_features, in_features = weight.shape
    bound_a, bound_b = balanced_bounds(out_features, in_features, rank)
    lora_a = uniform((rank, in_features), bound_a, generator_for("lora_a"))
    lora_b = uniform((out_features, rank), bound_b, generator_for("lora_b")).t()
    return {
        "weight": without_update(weight, lora_a, lora_b, scale),
        "lora_a": lora_a,
        "lora_b": lora_b,
    }


def balanced_bounds(out_features: int, in_features: int, rank: int) -> tuple[float, float]:
    """Bounds of the uniform distributions for A and B that give both factors gradients of like size (SwitchLoRA, arXiv
    2406.06564, initialization): sqrt(3) times

    std_A = (rank sqrt(out) / in^(3/2))^(1/4) sqrt(gain), std_B = (rank / sqrt(out in))^(1/4) sqrt(gain).
    """
    std_a = (rank * math.sqrt(out_features) / in_features**1.5) ** 0.25 * math.sqrt(GAIN)
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * math.sqrt(GAIN)
    return math.sqrt(3) * std_a, math.sqrt(3) * std_b


def without_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W such that W + s B A is `weight` [out, in], with `lora_a` [rank, in] and `lora_b` [rank, out]."""
    return torch.addmm(weight, lora_b.t(), lora_a, alpha=-scale)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """fp32 values drawn uniformly from [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
