"""Layers with low-rank factors, and the base classes of the methods that train them."""

from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.linear import (
    LowRankLinear,
    balanced_bounds,
    lora_bounds,
    low_rank_layers,
)
from switchtitan.methods.lowrank.replacing import LowRankMethod

__all__ = [
    "LowRankConfig",
    "LowRankLinear",
    "LowRankMethod",
    "balanced_bounds",
    "lora_bounds",
    "low_rank_layers",
]
