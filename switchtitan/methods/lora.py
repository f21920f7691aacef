"""LoRA from scratch: low-rank factors next to frozen random weights (arXiv 2106.09685)."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from switchtitan.methods.adapter.method import AdapterConfig, AdapterMethod


class ZeroStartConfig(AdapterConfig):
    """The keys of methods whose B starts at zero."""

    former_defaults: ClassVar[Mapping[str, object]] = {
        **AdapterConfig.former_defaults,
        "alpha": 1.0,
    }
    alpha: float = Field(default=32.0, gt=0)
    """The low-rank update is scaled by alpha / rank; above 0. Of 1, 16 and 32, 32 has the lowest
    test loss at rank 32, each with its best `[optimizer] lr`: 0.04, 0.008 and 0.004 (RESULTS.md).
    SwitchLoRA's authors compare with 1."""


class LoraConfig(ZeroStartConfig):
    """`[method] name = "lora"`: LoRA (arXiv 2106.09685). Embeddings, norms and head train at full
    rank."""

    trains_bf16: ClassVar[bool] = True
    name: Literal["lora"] = "lora"
    """The method."""
    init: Literal["lora", "balanced"] = "lora"
    """Initial values of the factors: `lora` draws A at random and sets B to zero; `balanced` draws
    both, so that their gradients have similar size, as in SwitchLoRA; it needs `alpha`, e.g. 1."""

    @model_validator(mode="after")
    def _check_alpha(self) -> "LoraConfig":
        if self.init == "balanced" and "alpha" not in self.model_fields_set:
            raise ValueError(
                f'init = "balanced": alpha is missing, and its default, {self.alpha:g}, is for '
                'init = "lora"; write alpha = 1, as in SwitchLoRA'
            )
        return self

    @property
    def is_balanced(self) -> bool:
        return self.init == "balanced"


class Lora(AdapterMethod[LoraConfig]):
    """Trains low-rank factors and freezes their weights."""
