"""LoRA from scratch: fixed low-rank factors beside frozen random weights (arXiv 2106.09685)."""

from typing import Literal

from switchtitan.methods.lowrank import (
    InitialFactors,
    LowRankConfig,
    LowRankMethod,
    balanced_init,
    lora_init,
)


class LoraConfig(LowRankConfig):
    """`[method] name = "lora"`: LoRA (arXiv 2106.09685); embeddings, norms and head train at full rank."""

    name: Literal["lora"] = "lora"
    """The method."""
    init: Literal["lora", "balanced"] = "lora"
    """How factors start: `lora` A small and random, B zero; `balanced` both random so that their gradients are of like size,
    the initialization of SwitchLoRA without its switching."""


class Lora(LowRankMethod[LoraConfig]):
    """Low-rank factors, trained; their weights, frozen."""

    def initial_factors(self) -> InitialFactors:
        return lora_init if self.config.init == "lora" else balanced_init
