"""The method ReLoRA: its configuration, and the optimizer that resets the factors."""

import logging
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.contracts import (
    LanguageModel,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.random import draw_vectors, generator_for
from switchtitan.distributed.shards import copy_from_full_, full_tensor, local, row_range
from switchtitan.methods.lowrank import (
    LowRankLinear,
    LowRankMethod,
    lora_bounds,
    low_rank_layers,
)
from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.rounding import Rounding, StochasticRounding, add_product_
from switchtitan.regions import region


class ResetSchedule:
    """Counts a run's steps and resets.

    A reset follows every `interval`-th step except the last of the run (ReLoRA, arXiv 2307.05695,
    Algorithm 1).

    Args:
        interval: steps between two resets.
        warmup_steps: steps of the learning rate's warm-up after a reset.
        num_steps: length of the run.

    Attributes:
        num_resets: resets so far.
    """

    def __init__(self, interval: int, warmup_steps: int, num_steps: int) -> None:
        self._interval, self._warmup_steps, self._num_steps = interval, warmup_steps, num_steps
        self._steps_done = 0
        self.num_resets = 0
        # Not derived from the number of steps: a run extended later had no reset at its first end.
        self._last_reset_step = 0

    def lr_factor(self) -> float:
        """Returns the next step's warm-up factor: (steps since the reset + 1) / warmup_steps, at
        most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a
        reset has a learning rate of zero. Here it is above zero, as in the warm-up at the start of
        a run, so that no step is without effect.
        """
        if self.num_resets == 0:
            return 1.0
        return min(1.0, (self._steps_done - self._last_reset_step + 1) / max(1, self._warmup_steps))

    def advance(self) -> bool:
        """Counts a step, and the reset that follows it; returns whether there is one."""
        self._steps_done += 1
        if self._steps_done % self._interval or self._steps_done >= self._num_steps:
            return False
        self.num_resets += 1
        self._last_reset_step = self._steps_done
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the counts as 0-dim int64 tensors."""
        return {
            "steps_done": torch.tensor(self._steps_done),
            "num_resets": torch.tensor(self.num_resets),
            "last_reset_step": torch.tensor(self._last_reset_step),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps_done = int(state["steps_done"])
        self.num_resets = int(state["num_resets"])
        self._last_reset_step = int(state["last_reset_step"])


@torch.no_grad()
def merge_and_restart_(layer: LowRankLinear, key: int, rounding: Rounding | None = None) -> None:
    """Adds s B A to W, draws A as at initialization, and zeroes B. The layer's output does not
    change.

    (ReLoRA, arXiv 2307.05695, Algorithm 1.) A is random because with A and B at zero, neither would
    get a gradient.

    Args:
        key: of the new A, which is uniform within `lora_bounds`; the same on every rank.
        rounding: for a weight in bf16; the layer's output is then unchanged in expectation.
    """
    held = row_range(layer.weight)
    lora_b = full_tensor(layer.lora_b)[:, held.start : held.stop]
    add_product_(local(layer.weight), lora_b.t(), full_tensor(layer.lora_a), layer.scale, rounding)
    own = row_range(layer.lora_a)
    slots = torch.arange(own.start, own.stop, device=layer.lora_a.device)
    bound = lora_bounds(layer.out_features, layer.in_features, layer.rank)[0]
    keys = torch.full((), key, device=slots.device)
    local(layer.lora_a).copy_(draw_vectors(keys, slots, layer.in_features, bound))
    local(layer.lora_b).zero_()


@torch.no_grad()
def prune_by_magnitude_(exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float) -> None:
    """Zeroes the smallest values of both moments, and first moments whose second moment is zeroed.

    The authors' code prunes the moments independently. But A's first gradient after a reset is
    zero, since B is: with only the second moment zeroed, Adam would divide the old first moment by
    eps, an update at least ten thousand times too large.

    Args:
        exp_avg, exp_avg_sq: [rows, width], changed in place. `num_pruned` second moments are
            zeroed, and at least as many first moments.
    """
    means, squares = full_tensor(exp_avg), full_tensor(exp_avg_sq)
    keep = largest(squares, prune_ratio)
    copy_from_full_(exp_avg_sq, torch.where(keep, squares, 0))
    copy_from_full_(exp_avg, torch.where(keep & largest(means.abs(), prune_ratio), means, 0))


@torch.no_grad()
def prune_at_random_(
    exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float, generator: torch.Generator
) -> None:
    """Zeroes `num_pruned` values of both moments at the same random places.

    The same in both, for the reason in `prune_by_magnitude_`.

    Args:
        exp_avg, exp_avg_sq: [rows, width], changed in place.
        generator: on the CPU; in the same state on every rank.
    """
    keep = to_device(
        largest(torch.rand(exp_avg.shape, generator=generator), prune_ratio), exp_avg.device
    )
    for moment in (exp_avg, exp_avg_sq):
        copy_from_full_(moment, torch.where(keep, full_tensor(moment), 0))


def largest(scores: Tensor, prune_ratio: float) -> Tensor:
    """Returns a mask of all but the `num_pruned` smallest scores; of equal ones, the first.

    Returns:
        bool, shaped like `scores`.
    """
    flat = scores.flatten()
    num_kept = flat.numel() - num_pruned(flat.numel(), prune_ratio)
    if num_kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Selecting takes an eighth of the time of sorting on a CPU.
    threshold = flat.topk(num_kept, sorted=False).values.min()
    keep, equal = flat > threshold, flat == threshold
    # Ties must not change the count, and ranks must agree on which to keep.
    keep |= equal & (equal.cumsum(0) <= num_kept - keep.sum())
    return keep.view(scores.shape)


def num_pruned(num_values: int, prune_ratio: float) -> int:
    """Returns the number of values to zero: `prune_ratio * num_values`, rounded."""
    return round(prune_ratio * num_values)


logger = logging.getLogger(__name__)


class ReloraConfig(LowRankConfig):
    """`[method] name = "relora"`: ReLoRA (arXiv 2307.05695). The paper starts from a model trained
    at full rank; see `[checkpoint] initial_weights`."""

    name: Literal["relora"] = "relora"
    """The method."""
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    reset_interval: int = Field(ge=1)
    """Optimizer steps between two resets, above restart_warmup_steps and below training.steps. A
    reset merges every layer's factors into its weight and reinitializes them. There is no reset
    after the last step."""
    restart_warmup_steps: int = Field(default=100, ge=0)
    """Steps over which all learning rates rise linearly from 0 to the schedule's value after a
    reset; 0 disables the warm-up. The paper uses 50 to 100."""
    reset_moments: Literal["magnitude", "random", "zero"] = "magnitude"
    """Which values of the factors' moments a reset keeps: `magnitude` the largest of each moment (a
    first moment only with its second), `random` a random subset, `zero` none, and it also resets
    the step counts."""
    prune_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Fraction, in (0, 1), of the values of each moment that a reset zeroes. Not with zero."""

    def check_length(self, num_steps: int) -> list[str]:
        """See `contracts.MethodConfig`."""
        if self.reset_interval < num_steps:
            return []
        return [
            f"[method] reset_interval = {self.reset_interval}: expected less than [training] "
            f"steps = {num_steps}, since a run without a reset is plain LoRA; lower it, "
            'increase steps, or choose name = "lora"'
        ]

    @model_validator(mode="after")
    def _check_resets(self) -> "ReloraConfig":
        if self.restart_warmup_steps >= self.reset_interval:
            raise ValueError(
                f"restart_warmup_steps = {self.restart_warmup_steps} is not below reset_interval = "
                f"{self.reset_interval}: the learning rate would never return to its schedule; "
                "lower it or increase reset_interval"
            )
        if self.reset_moments == "zero" and "prune_ratio" in self.model_fields_set:
            problem = 'prune_ratio has no effect with reset_moments = "zero"; remove it'
            raise VoidKeyError([VoidKey("prune_ratio", ("reset_moments",), problem)])
        return self


class Relora(LowRankMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and reinitialized at intervals."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        inner = super().build_optimizer(model, config, compile_step)
        return ReloraOptimizer(
            self.config, low_rank_layers(model), inner, self.num_steps, self.seed
        )


class ReloraOptimizer(TrainingOptimizer):
    """Wraps an optimizer and resets the factors after some steps; a `contracts.TrainingOptimizer`.

    Args:
        layers: the low-rank layers, by qualified name.
        inner: trains all parameters; its `state_dict` returns the live tensors
            `<parameter>.exp_avg`, `.exp_avg_sq` and `.step`.
        num_steps: length of the run.
        seed: the job's seed, for new factors, random pruning, and the rounding of bf16 weights.
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
        # Resets are rare: compiling would take longer than it saves.
        self._rounding = StochasticRounding(layers, seed, compile_step=False)
        self._lr_factor = 1.0

    def step(self) -> None:
        self._inner.step()
        if self._schedule.advance():
            with region("reset"):
                self._reset()

    def zero_grad(self) -> None:
        self._inner.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        """Sets every learning rate to its peak times `lr_factor` and the restart's warm-up
        factor."""
        self._lr_factor = self._schedule.lr_factor()
        self._inner.set_lr(lr_factor * self._lr_factor)

    def metrics(self) -> dict[str, float]:
        """Returns the inner optimizer's metrics, the resets so far, and the last warm-up factor."""
        return self._inner.metrics() | {
            "reset/resets_total": float(self._schedule.num_resets),
            "reset/lr_factor": self._lr_factor,
        }

    def replicated(self) -> dict[str, Tensor]:
        keys = {f"reset.{name}": tensor for name, tensor in self._rounding.replicated().items()}
        return self._inner.replicated() | keys

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the inner optimizer's state and the counts `reset.*`."""
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

    def _reset(self) -> None:
        number = self._schedule.num_resets
        state = self._inner.state_dict()
        roundings = self._rounding.of_event(number)
        for (layer_name, layer), rounding in zip(self._layers.items(), roundings, strict=True):
            key = generator_for(self._seed, f"{layer_name}.lora_a:{number}").initial_seed()
            merge_and_restart_(layer, key, rounding)
            for factor_name in (f"{layer_name}.lora_a", f"{layer_name}.lora_b"):
                self._prune_moments_(state, factor_name, number)
        logger.info(
            "reset %d: merged and reinitialized the factors of %d layers",
            number,
            len(self._layers),
        )

    def _prune_moments_(self, state: dict[str, Tensor], factor_name: str, number: int) -> None:
        exp_avg, exp_avg_sq = state[f"{factor_name}.exp_avg"], state[f"{factor_name}.exp_avg_sq"]
        if self._config.reset_moments == "magnitude":
            prune_by_magnitude_(exp_avg, exp_avg_sq, self._config.prune_ratio)
        elif self._config.reset_moments == "random":
            generator = generator_for(self._seed, f"{factor_name}.moments:{number}")
            prune_at_random_(exp_avg, exp_avg_sq, self._config.prune_ratio, generator)
        else:
            local(exp_avg).zero_()
            local(exp_avg_sq).zero_()
            # Zero moments with an old step count would get no bias correction: updates of
            # (1 - beta1) / sqrt(1 - beta2), three times the learning rate with the usual betas.
            state[f"{factor_name}.step"].zero_()
