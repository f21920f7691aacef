"""ReLoRA as a component."""

from torch import Tensor, nn

from switchtitan.config.section import Section
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import (
    LowRankLinear,
    lora_init,
    low_rank_layer_for,
    low_rank_layers,
    merged_state_dict,
    replace_linears,
)
from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.optimizer import ReloraOptimizer
from switchtitan.optim import OPTIMIZERS


class Relora:
    """Low-rank factors that are merged into their weights and start anew, again and again; a `contracts.Method`."""

    def __init__(self, config: ReloraConfig, num_steps: int, seed: int) -> None:
        self._config, self._num_steps, self._seed = config, num_steps, seed

    def prepare_model(self, model: nn.Module) -> None:
        replace_linears(model, self._config.targets, self._build_layer)

    def build_optimizer(self, model: nn.Module, config: Section, compile_step: bool) -> TrainingOptimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = OPTIMIZERS.build(config, trained, local, compile_step)
        return ReloraOptimizer(self._config, low_rank_layers(model), inner, self._num_steps, self._seed)

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_state_dict(model)

    def _build_layer(self, linear: nn.Linear) -> LowRankLinear:
        return low_rank_layer_for(linear, self._config, lora_init)
