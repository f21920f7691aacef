"""Full-rank training, the baseline."""

from typing import ClassVar, Literal

from switchtitan.contracts import (
    LanguageModel,
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.optim import OPTIMIZERS, trained_parameters


class FullRankConfig(MethodConfig):
    """`[method] name = "full_rank"`."""

    name: Literal["full_rank"] = "full_rank"
    """The method."""
    treats_all_parameters: ClassVar[bool] = True

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return False


class FullRank(Method[FullRankConfig]):
    """Trains all parameters of the model."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        return OPTIMIZERS.build(
            config, trained_parameters(model, blocks=model.blocks()), compile_step, self.seed
        )
