"""ReLoRA: factors that are merged into their weights and restart, and the optimizer that resets them."""

import logging
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import local
from switchtitan.methods.lowrank import LowRankLinear, LowRankMethod, low_rank_layers
from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.rounding import StochasticRounding
from switchtitan.methods.relora.reset import (
    ResetSchedule,
    merge_and_restart_,
    prune_by_lot_,
    prune_by_magnitude_,
)
from switchtitan.optim import OPTIMIZERS

logger = logging.getLogger(__name__)


class ReloraConfig(LowRankConfig):
    """`[method] name = "relora"`: ReLoRA (arXiv 2307.05695); the paper starts it from a model that was trained at full rank for
    a while, see `[checkpoint] initial_weights`."""

    name: Literal["relora"] = "relora"
    """The method."""
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    reset_interval: int = Field(ge=1)
    """Optimizer steps between two resets, above restart_warmup_steps and below training.steps. A reset merges every layer's
    factors into its weight and starts them anew; none happens at the very end of the run."""
    restart_warmup_steps: int = Field(default=100, ge=0)
    """Steps over which all learning rates rise linearly from 0 at a reset back to what the schedule gives; the paper has 50 to
    100, and 0 does without."""
    reset_moments: Literal["magnitude", "random", "zero"] = "magnitude"
    """What a reset leaves of the factors' optimizer state: `magnitude` the largest values of each moment (a first moment only
    beside its second), `random` values drawn by lot, `zero` nothing, step counts included."""
    prune_ratio: float = Field(default=0.9, gt=0, lt=1)
    """The share, in (0, 1), of the values of each moment that a reset zeroes. Has no effect with zero."""

    def check_length(self, num_steps: int) -> list[str]:
        """What is wrong between this section and a run of so many steps."""
        if self.reset_interval < num_steps:
            return []
        return [
            f"[method] reset_interval = {self.reset_interval}: expected less than [training] steps = {num_steps}, since a run "
            'that never resets is plain LoRA; lower it, raise steps, or choose name = "lora"'
        ]

    @model_validator(mode="after")
    def _check_resets(self) -> "ReloraConfig":
        if self.restart_warmup_steps >= self.reset_interval:
            raise ValueError(
                f"restart_warmup_steps = {self.restart_warmup_steps} is not below reset_interval = {self.reset_interval}: the "
                "learning rate would never come back to its schedule; lower it or raise reset_interval"
            )
        if self.reset_moments == "zero" and "prune_ratio" in self.model_fields_set:
            raise ValueError('prune_ratio has no effect with reset_moments = "zero"; remove it')
        return self


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
