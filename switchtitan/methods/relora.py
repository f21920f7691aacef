"""The method ReLoRA: its configuration, and the optimizer that resets the factors."""

import logging
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from switchtitan.contracts import LanguageModel, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.random import draw_vectors, generator_for
from switchtitan.distributed.shards import copy_from_full_, full_tensor, local, row_range
from switchtitan.methods.lowrank import LowRankLinear, LowRankMethod, lora_bounds, low_rank_layers
from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.linear import FACTORS
from switchtitan.methods.lowrank.rounding import AddProduct, StochasticRounding, add_product_
from switchtitan.optim.base import SplitOptimizer
from switchtitan.regions import region

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
        return self

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        void = super().without_effect()
        if self.reset_moments == "zero" and not self.is_default("prune_ratio"):
            void.append(
                f'prune_ratio = {self.prune_ratio} has no effect with reset_moments = "zero"'
            )
        return void


class Relora(LowRankMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and reinitialized at intervals."""

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        inner = super().build_optimizer(model, config, compile_step)
        layers = low_rank_layers(model)
        return ReloraOptimizer(self.config, layers, inner, self.num_steps, self.seed)


class ReloraOptimizer(SplitOptimizer):
    """Wraps an optimizer and resets the factors after every `reset_interval`-th step except the
    last of the run (ReLoRA, arXiv 2307.05695, Algorithm 1).

    Args:
        layers: the low-rank layers, by qualified name.
        inner: AdamW for all parameters.
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
        super().__init__([inner])
        self._config, self._layers, self._inner, self._seed = config, layers, inner, seed
        self._num_steps = num_steps
        # Resets are rare: compiling would take longer than it saves.
        self._rounding = StochasticRounding(layers, seed, compile_step=False)
        # The last reset does not follow from the number of steps: a run extended later had none at
        # its first end.
        self._steps_done = self._num_resets = self._last_reset_step = 0
        self._warmup_factor = 1.0

    def step(self) -> None:
        super().step()
        self._steps_done += 1
        is_due = self._steps_done % self._config.reset_interval == 0
        if is_due and self._steps_done < self._num_steps:
            self._num_resets += 1
            self._last_reset_step = self._steps_done
            with region("reset"):
                self._reset()

    def set_lr(self, lr_factor: float) -> None:
        """Sets every learning rate to its peak times `lr_factor` and the restart's warm-up factor,
        (steps since the reset + 1) / restart_warmup_steps, at most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a
        reset has a learning rate of zero. Here it is above zero, as in the warm-up at the start of
        a run, so that no step is without effect.
        """
        self._warmup_factor = 1.0
        if self._num_resets:
            num_steps_since = self._steps_done - self._last_reset_step + 1
            num_warmup_steps = max(1, self._config.restart_warmup_steps)
            self._warmup_factor = min(1.0, num_steps_since / num_warmup_steps)
        super().set_lr(lr_factor * self._warmup_factor)

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {
            "reset/resets_total": float(self._num_resets),
            "reset/lr_factor": self._warmup_factor,
        }

    def replicated(self) -> dict[str, Tensor]:
        keys = {f"reset.{name}": tensor for name, tensor in self._rounding.replicated().items()}
        return super().replicated() | keys

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the inner optimizer's state and the counts `reset.*`."""
        return super().state_dict() | {
            "reset.steps_done": torch.tensor(self._steps_done),
            "reset.num_resets": torch.tensor(self._num_resets),
            "reset.last_reset_step": torch.tensor(self._last_reset_step),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._steps_done = int(state["reset.steps_done"])
        self._num_resets = int(state["reset.num_resets"])
        self._last_reset_step = int(state["reset.last_reset_step"])

    def _reset(self) -> None:
        number, adds = self._num_resets, self._rounding.of_event(self._num_resets)
        for (name, layer), add in zip(self._layers.items(), adds, strict=True):
            key = generator_for(self._seed, f"{name}.lora_a:{number}").initial_seed()
            merge_and_restart_(layer, key, add)
            for factor in FACTORS:
                self._prune(f"{name}.{factor}")
        logger.info("reset %d: merged and reinitialized factors of %d layers", number, len(adds))

    def _prune(self, factor: str) -> None:
        state = self._inner.state_dict()
        exp_avg, exp_avg_sq = state[f"{factor}.exp_avg"], state[f"{factor}.exp_avg_sq"]
        if self._config.reset_moments == "zero":
            local(exp_avg).zero_()
            local(exp_avg_sq).zero_()
            # Zero moments with an old step count would get no bias correction: updates of
            # (1 - beta1) / sqrt(1 - beta2), three times the learning rate with the usual betas.
            state[f"{factor}.step"].zero_()
            return
        generator = None
        if self._config.reset_moments == "random":
            generator = generator_for(self._seed, f"{factor}.moments:{self._num_resets}")
        prune_(exp_avg, exp_avg_sq, self._config.prune_ratio, generator)


@torch.no_grad()
def merge_and_restart_(layer: LowRankLinear, key: int, add: AddProduct = add_product_) -> None:
    """Adds s B A to W, draws A as at initialization, and zeroes B. The layer's output does not
    change, with a weight in bf16 in expectation.

    (ReLoRA, arXiv 2307.05695, Algorithm 1.) A is random because with A and B at zero, neither would
    get a gradient.

    Args:
        key: of the new A, which is uniform within `lora_bounds`; the same on every rank.
        add: adds the product.
    """
    held = row_range(layer.weight)
    lora_b = full_tensor(layer.lora_b)[:, held.start : held.stop]
    add(local(layer.weight), lora_b.t(), full_tensor(layer.lora_a), layer.scale)
    own = row_range(layer.lora_a)
    slots = torch.arange(own.start, own.stop, device=layer.lora_a.device)
    bound, _ = lora_bounds(layer.out_features, layer.in_features, layer.rank)
    keys = torch.full((), key, device=slots.device)
    local(layer.lora_a).copy_(draw_vectors(keys, slots, layer.in_features, bound))
    local(layer.lora_b).zero_()


@torch.no_grad()
def prune_(
    exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float, generator: torch.Generator | None
) -> None:
    """Zeroes the smallest values of both moments, or random ones, the same in both.

    A first moment is zeroed with its second one, which the authors' code does not do. But A's first
    gradient after a reset is zero, since B is: with only the second moment zeroed, Adam would
    divide the old first moment by eps, an update at least ten thousand times too large.

    Args:
        exp_avg, exp_avg_sq: [rows, width], changed in place. `prune_ratio` of the second moments
            are zeroed, and at least as many first moments.
        generator: of the random places, on the CPU, in the same state on every rank; None for the
            smallest values.
    """
    means, squares = full_tensor(exp_avg), full_tensor(exp_avg_sq)
    if generator is None:
        keep = largest(squares, prune_ratio)
        keep_means = keep & largest(means.abs(), prune_ratio)
    else:
        scores = torch.rand(exp_avg.shape, generator=generator)
        keep = keep_means = to_device(largest(scores, prune_ratio), means.device)
    copy_from_full_(exp_avg_sq, torch.where(keep, squares, 0))
    copy_from_full_(exp_avg, torch.where(keep_means, means, 0))


def largest(scores: Tensor, prune_ratio: float) -> Tensor:
    """Returns a bool mask of all but the smallest `prune_ratio` of the scores, a rounded number; of
    equal ones, the first are kept."""
    flat = scores.flatten()
    num_kept = flat.numel() - round(prune_ratio * flat.numel())
    if num_kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Selecting takes an eighth of the time of sorting on a CPU.
    threshold = flat.topk(num_kept, sorted=False).values.min()
    keep, equal = flat > threshold, flat == threshold
    # Ties must not change the count, and ranks must agree on which to keep.
    keep |= equal & (equal.cumsum(0) <= num_kept - keep.sum())
    return keep.view(scores.shape)
