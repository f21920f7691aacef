"""Full-rank training, the baseline."""

from typing import Literal

from switchtitan.contracts import (
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainedModel,
    TrainingOptimizer,
)
from switchtitan.methods.targets import linear_layers
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import trained_parameters


class FullRankConfig(MethodConfig):
    """`[method] name = "full_rank"`."""

    name: Literal["full_rank"] = "full_rank"
    """The method."""


class FullRank(Method[FullRankConfig]):
    """Trains all parameters of the model."""

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        # Those that low-rank methods target by default: `lr` and `other_lr` then apply to the same
        # layers with every method.
        targeted = {f"{name}.weight" for name in linear_layers(model)}
        return OPTIMIZERS.build(config, trained_parameters(model, targeted), compile_step)
