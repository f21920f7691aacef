"""The low-rank layer of LoRA-like methods: parameters, initial values and contractions."""

from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.linear import (
    InitialFactors,
    LayerBuffer,
    LowRankLinear,
    balanced_init,
    lora_init,
    low_rank_layer_for,
    low_rank_layers,
    replace_linears,
)
from switchtitan.methods.lowrank.method import LowRankMethod

__all__ = [
    "InitialFactors",
    "LayerBuffer",
    "LowRankConfig",
    "LowRankLinear",
    "LowRankMethod",
    "balanced_init",
    "lora_init",
    "low_rank_layer_for",
    "low_rank_layers",
    "replace_linears",
]
