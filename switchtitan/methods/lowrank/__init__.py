"""The low-rank layer that LoRA-like methods share: its parameters, initial values and contractions."""

from switchtitan.methods.lowrank.init import lora_init
from switchtitan.methods.lowrank.linear import LowRankLinear, low_rank_layers, replace_linears

__all__ = ["LowRankLinear", "lora_init", "low_rank_layers", "replace_linears"]
