"""LoRA from scratch: low-rank factors next to frozen random weights (arXiv 2106.09685)."""

from typing import Literal

from switchtitan.methods.lowrank.linear import balanced_bounds, lora_bounds
from switchtitan.methods.lowrank.method import LowRankConfig, LowRankMethod


class LoraConfig(LowRankConfig):
    """`[method] name = "lora"`: LoRA (arXiv 2106.09685). Embeddings, norms and head train at full
    rank."""

    name: Literal["lora"] = "lora"
    """The method."""
    init: Literal["lora", "balanced"] = "lora"
    """Initial values of the factors: `lora` draws A at random and sets B to zero; `balanced` draws
    both, so that their gradients have similar size, as in SwitchLoRA."""


class Lora(LowRankMethod[LoraConfig]):
    """Trains low-rank factors and freezes their weights."""

    def bounds(self, out_features: int, in_features: int) -> tuple[float, float]:
        of_init = lora_bounds if self.config.init == "lora" else balanced_bounds
        return of_init(out_features, in_features, self.config.rank)
