"""Initial values of the factors."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def lora_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """A uniform on +-1/sqrt(in), B zero, W untouched (LoRA, arXiv 2106.09685, with Kaiming-uniform A, a = sqrt 5).

    Args:
        weight: [out, in], the plain layer's initial weight.

    Returns:
        `weight` [out, in], `lora_a` [rank, in], `lora_b` [out, rank].
    """
    out_features, in_features = weight.shape
    lora_a = uniform((rank, in_features), 1 / math.sqrt(in_features), generator_for("lora_a"))
    return {"weight": weight, "lora_a": lora_a, "lora_b": torch.zeros(out_features, rank)}


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """fp32 values drawn uniformly from [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
