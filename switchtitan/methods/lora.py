"""LoRA from scratch: fixed low-rank factors beside frozen random weights (arXiv 2106.09685)."""

from typing import Literal

from torch import Tensor, nn

from switchtitan.config.section import Section
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import (
    LowRankConfig,
    LowRankLinear,
    balanced_init,
    lora_init,
    low_rank_layer_for,
    merged_state_dict,
    replace_linears,
)
from switchtitan.optim import OPTIMIZERS


class LoraConfig(LowRankConfig):
    """`[method] name = "lora"`: LoRA (arXiv 2106.09685); embeddings, norms and head train at full rank."""

    name: Literal["lora"] = "lora"
    """The method."""
    init: Literal["lora", "balanced"] = "lora"
    """How factors start: `lora` A small and random, B zero; `balanced` both random so that their gradients are of like size,
    the initialization of SwitchLoRA without its switching."""


class Lora:
    """Low-rank factors, trained; their weights, frozen; a `contracts.Method`."""

    def __init__(self, config: LoraConfig, num_steps: int, seed: int) -> None:
        self._config = config

    def prepare_model(self, model: nn.Module) -> None:
        replace_linears(model, self._config.targets, self._build_layer)

    def build_optimizer(self, model: nn.Module, config: Section, compile_step: bool) -> TrainingOptimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return OPTIMIZERS.build(config, trained, local, compile_step)

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_state_dict(model)

    def _build_layer(self, linear: nn.Linear) -> LowRankLinear:
        return low_rank_layer_for(
            linear, self._config, lora_init if self._config.init == "lora" else balanced_init
        )
