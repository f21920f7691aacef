"""Training every weight directly: the baseline."""

from typing import Literal

from torch import Tensor, nn

from switchtitan.config.section import Section
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import merged_state_dict
from switchtitan.optim import OPTIMIZERS


class FullRankConfig(Section):
    """`[method] name = "full_rank"`."""

    name: Literal["full_rank"] = "full_rank"
    """The method."""


class FullRank:
    """All parameters of the plain model train; a `contracts.Method`."""

    def __init__(self, config: FullRankConfig, num_steps: int, seed: int) -> None:
        pass

    def prepare_model(self, model: nn.Module) -> None:
        pass

    def build_optimizer(self, model: nn.Module, config: Section, compile_step: bool) -> TrainingOptimizer:
        return OPTIMIZERS.build(config, model.named_parameters(), local, compile_step)

    def merged_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        return merged_state_dict(model)
