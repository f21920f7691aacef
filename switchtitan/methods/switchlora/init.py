"""How a SwitchLoRA layer starts: all candidates are drawn, and the factors are copies of some of them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from switchtitan.methods.lowrank.init import balanced_bounds, uniform, without_update
from switchtitan.methods.switchlora.schedule import initial_slots


def num_candidates(out_features: int, in_features: int) -> int:
    """Candidates on each side of a layer: as many as its weight has singular values."""
    return min(out_features, in_features)


def candidate_shapes(out_features: int, in_features: int) -> dict[str, tuple[int, int]]:
    """`candidates_a` [c, in], `candidates_b` [out, c]."""
    count = num_candidates(out_features, in_features)
    return {"candidates_a": (count, in_features), "candidates_b": (out_features, count)}


def balanced_candidates_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Candidates of both sides random with `balanced_bounds`, and W := weight - s B A.

    Args:
        weight: [out, in], the plain layer's initial weight.

    Returns:
        `weight`, `lora_a`, `lora_b`, `candidates_a`, `candidates_b`.
    """
    out_features, in_features = weight.shape
    bound_a, bound_b = balanced_bounds(out_features, in_features, rank)
    return _from_candidates(weight, rank, scale, generator_for, bound_a, bound_b)


def lora_candidates_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """A's candidates uniform on +-1/sqrt(in), B's zero, W untouched. Returns as `balanced_candidates_init`."""
    return _from_candidates(weight, rank, scale, generator_for, 1 / math.sqrt(weight.shape[1]), 0.0)


def _from_candidates(
    weight: Tensor,
    rank: int,
    scale: float,
    generator_for: Callable[[str], torch.Generator],
    bound_a: float,
    bound_b: float,
) -> dict[str, Tensor]:
    shapes = candidate_shapes(*weight.shape)
    candidates_a = uniform(shapes["candidates_a"], bound_a, generator_for("candidates_a"))
    candidates_b = uniform(shapes["candidates_b"], bound_b, generator_for("candidates_b"))
    slots_a, slots_b = initial_slots(rank, len(candidates_a))
    lora_a, lora_b = candidates_a[slots_a], candidates_b[:, slots_b]
    return {
        "weight": without_update(weight, lora_a, lora_b, scale),
        "lora_a": lora_a,
        "lora_b": lora_b,
        "candidates_a": candidates_a,
        "candidates_b": candidates_b,
    }
