"""Full-rank training, the baseline."""

from typing import Literal

from torch import nn

from switchtitan.contracts import (
    LanguageModel,
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import trained_parameters


class FullRankConfig(MethodConfig):
    """`[method] name = "full_rank"`."""

    name: Literal["full_rank"] = "full_rank"
    """The method."""


class FullRank(Method[FullRankConfig]):
    """Trains all parameters of the model."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        parameters = trained_parameters(model, linear_weights(model))
        return OPTIMIZERS.build(config, parameters, compile_step)


def linear_weights(model: LanguageModel) -> set[str]:
    """Returns the names of the weights of the linear layers in the model's blocks.

    Low-rank methods change these by default, so that `[optimizer] lr` and `other_lr` apply to the
    same layers with every method. Found by type: they do not depend on a model's names.
    """
    return {
        f"{block_name}.{name}.weight"
        for block_name, block in model.blocks().items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
