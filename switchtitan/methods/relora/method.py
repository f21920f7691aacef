"""ReLoRA as a component."""

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.methods.lowrank import LowRankMethod, low_rank_layers
from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.optimizer import ReloraOptimizer
from switchtitan.optim import OPTIMIZERS


class Relora(LowRankMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and restart, again and again."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        inner = OPTIMIZERS.build(config, self.trained_parameters(model), compile_step)
        return ReloraOptimizer(self.config, low_rank_layers(model), inner, self.num_steps, self.seed)
