"""Layers with low-rank factors, and the base classes of the methods that train them."""

from switchtitan.methods.lowrank.linear import (
    FACTORS,
    LowRankLinear,
    balanced_bounds,
    lora_bounds,
    low_rank_layers,
)
from switchtitan.methods.lowrank.method import (
    FactorConfig,
    LowRankConfig,
    LowRankMethod,
    ReplacingMethod,
)
from switchtitan.methods.lowrank.rounding import FrozenWeights

__all__ = [
    "FACTORS",
    "FactorConfig",
    "FrozenWeights",
    "LowRankConfig",
    "LowRankLinear",
    "LowRankMethod",
    "ReplacingMethod",
    "balanced_bounds",
    "lora_bounds",
    "low_rank_layers",
]
