"""Full-rank training, the baseline."""

from typing import ClassVar, Literal

from switchtitan.contracts import (
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainedModel,
    TrainingOptimizer,
)
from switchtitan.methods.targets import linear_layers
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import trained_parameters, with_width_factors


class FullRankConfig(MethodConfig):
    """`[method] name = "full_rank"`."""

    trains_bf16: ClassVar[bool] = True
    name: Literal["full_rank"] = "full_rank"
    """The method."""

    def width_exponent(self, of_matrices: float) -> float:
        return of_matrices


class FullRank(Method[FullRankConfig]):
    """Trains all parameters of the model."""

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        # Those that low-rank methods target by default: `lr` and `other_lr` then apply to the same
        # layers with every method.
        targeted = {f"{name}.weight" for name in linear_layers(model)}
        entries = trained_parameters(model, targeted)
        trained = with_width_factors(entries, model, self.config, config)
        return OPTIMIZERS.build(config, trained, compile_step)
