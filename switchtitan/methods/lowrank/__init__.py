"""The low-rank layer of LoRA-like methods: parameters, initial values and contractions."""

from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.linear import (
    LowRankLinear,
    balanced_bounds,
    lora_bounds,
    low_rank_layers,
    replace_linears,
)
from switchtitan.methods.lowrank.method import LowRankMethod

__all__ = [
    "LowRankConfig",
    "LowRankLinear",
    "LowRankMethod",
    "balanced_bounds",
    "lora_bounds",
    "low_rank_layers",
    "replace_linears",
]
