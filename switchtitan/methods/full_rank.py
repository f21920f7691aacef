"""Training every weight directly: the baseline."""

from typing import Literal

from torch import nn

from switchtitan.contracts import Method, MethodConfig, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.optim import OPTIMIZERS


class FullRankConfig(MethodConfig):
    """`[method] name = "full_rank"`."""

    name: Literal["full_rank"] = "full_rank"
    """The method."""


class FullRank(Method[FullRankConfig]):
    """All parameters of the plain model train."""

    def build_optimizer(
        self, model: nn.Module, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        return OPTIMIZERS.build(config, model.named_parameters(), local, compile_step)
