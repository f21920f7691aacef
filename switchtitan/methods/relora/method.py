"""ReLoRA as a component."""

from torch import nn

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import LowRankMethod, low_rank_layers
from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.optimizer import ReloraOptimizer
from switchtitan.optim import OPTIMIZERS


class Relora(LowRankMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and restart, again and again."""

    def build_optimizer(
        self, model: nn.Module, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = OPTIMIZERS.build(config, trained, local, compile_step)
        return ReloraOptimizer(self.config, low_rank_layers(model), inner, self.num_steps, self.seed)
