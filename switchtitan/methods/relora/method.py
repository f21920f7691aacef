"""ReLoRA: factors that are merged into their weights and restart, and the optimizer that resets them."""

import logging

from torch import Tensor

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import LowRankLinear, LowRankMethod, low_rank_layers
from switchtitan.methods.lowrank.rounding import StochasticRounding
from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.reset import (
    ResetSchedule,
    merge_and_restart_,
    prune_by_lot_,
    prune_by_magnitude_,
)
from switchtitan.optim import OPTIMIZERS

logger = logging.getLogger(__name__)


class Relora(LowRankMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and restart, again and again."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        inner = OPTIMIZERS.build(config, self.trained_parameters(model), compile_step)
        return ReloraOptimizer(
            self.config, low_rank_layers(model), inner, self.num_steps, self.seed
        )


class ReloraOptimizer:
    """Steps with another optimizer and resets at the end of a step that is due; a `contracts.TrainingOptimizer`.

    Args:
        layers: those with factors, by qualified name.
        inner: trains all parameters; its state holds the live `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`.
        num_steps: length of the run.
        seed: of the job; new factors, what random pruning keeps and how weights in bf16 are rounded follow from it.
    """

    def __init__(
        self,
        config: ReloraConfig,
        layers: dict[str, LowRankLinear],
        inner: TrainingOptimizer,
        num_steps: int,
        seed: int,
    ) -> None:
        self._config, self._layers, self._inner, self._seed = config, layers, inner, seed
        self._schedule = ResetSchedule(
            config.reset_interval, config.restart_warmup_steps, num_steps
        )
        # Resets are rare: a compiler would work longer than it saves.
        self._rounding = StochasticRounding(layers, seed, compile_step=False)
        self._lr_factor = 1.0

    def step(self) -> None:
        self._inner.step()
        if self._schedule.advance():
            self._reset_()

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        """Sets every learning rate to its configured value times `lr_factor` and the factor of the restart's warm-up."""
        self._lr_factor = self._schedule.lr_factor()
        self._inner.set_lr(lr_factor * self._lr_factor)

    def metrics(self) -> dict[str, float]:
        """The inner optimizer's; resets so far; and the last step's factor on the learning rate, below 1 after a reset."""
        return self._inner.metrics() | {
            "reset/resets_total": float(self._schedule.num_resets),
            "reset/lr_factor": self._lr_factor,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The inner optimizer's, and `reset.*`: the counts that resets and the learning rate follow from."""
        counts = {f"reset.{key}": tensor for key, tensor in self._schedule.state_dict().items()}
        return self._inner.state_dict() | counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._inner.load_state_dict(state)
        prefix = "reset."
        self._schedule.load_state_dict(
            {
                key.removeprefix(prefix): tensor
                for key, tensor in state.items()
                if key.startswith(prefix)
            }
        )

    def _reset_(self) -> None:
        number = self._schedule.num_resets
        state = self._inner.state_dict()
        roundings = self._rounding.of_event(number)
        for (layer_name, layer), rounding in zip(self._layers.items(), roundings, strict=True):
            merge_and_restart_(
                layer, generator_for(self._seed, f"{layer_name}.lora_a:{number}"), rounding
            )
            for factor_name in (f"{layer_name}.lora_a", f"{layer_name}.lora_b"):
                self._prune_moments_(state, factor_name, number)
        logger.info(
            "Reset %d: the factors of %d layers were merged and start anew",
            number,
            len(self._layers),
        )

    def _prune_moments_(self, state: dict[str, Tensor], factor_name: str, number: int) -> None:
        exp_avg, exp_avg_sq = state[f"{factor_name}.exp_avg"], state[f"{factor_name}.exp_avg_sq"]
        if self._config.reset_moments == "magnitude":
            prune_by_magnitude_(exp_avg, exp_avg_sq, self._config.prune_ratio)
        elif self._config.reset_moments == "random":
            generator = generator_for(self._seed, f"{factor_name}.moments:{number}")
            prune_by_lot_(exp_avg, exp_avg_sq, self._config.prune_ratio, generator)
        else:
            local(exp_avg).zero_()
            local(exp_avg_sq).zero_()
            # Moments of zero with an old step count would get no bias correction: steps of (1 - beta1) / sqrt(1 - beta2),
            # three times the learning rate with the usual betas.
            state[f"{factor_name}.step"].zero_()
