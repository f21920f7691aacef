"""The method ReLoRA: its configuration, and the optimizer that resets the factors."""

import logging
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from switchtitan.contracts import OptimizerConfig, TrainedModel, TrainingOptimizer
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.shards import copy_from_full_, full_tensor, local, row_range
from switchtitan.methods.adapter.linear import AdapterLinear, adapter_layers
from switchtitan.methods.adapter.method import AdapterMethod
from switchtitan.methods.adapter.rounding import FrozenWeights
from switchtitan.methods.lora import ZeroStartConfig
from switchtitan.methods.targets import FACTORS
from switchtitan.numerics.random import draw_vectors, generator_for
from switchtitan.optim.base import SplitOptimizer
from switchtitan.regions import region

logger = logging.getLogger(__name__)


class ReloraConfig(ZeroStartConfig):
    """`[method] name = "relora"`: ReLoRA (arXiv 2307.05695). The paper starts from a model trained
    at full rank; see `[checkpoint] initial_weights`."""

    name: Literal["relora"] = "relora"
    """The method."""
    optimizers: ClassVar[frozenset[str] | None] = frozenset({"adamw"})
    reset_interval: int = Field(ge=1)
    """Optimizer steps between two resets, above restart_warmup_steps and below training.steps. A
    reset merges every layer's factors into its weight and reinitializes them. None follows the
    last step."""
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
        void = super().without_effect()
        if self.reset_moments == "zero" and not self.is_default("prune_ratio"):
            void.append(
                f'prune_ratio = {self.prune_ratio} has no effect with reset_moments = "zero"'
            )
        return void


class Relora(AdapterMethod[ReloraConfig]):
    """Low-rank factors that are merged into their weights and reinitialized at intervals."""

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        inner = super().build_optimizer(model, config, compile_step)
        layers = adapter_layers(model)
        return ReloraOptimizer(self.config, layers, inner, self.num_steps, self.seed)


class ReloraOptimizer(SplitOptimizer):
    """Wraps AdamW of all parameters and resets the factors after every `reset_interval`-th step
    except the last of the run, number `num_steps` (ReLoRA, arXiv 2307.05695, Algorithm 1)."""

    def __init__(
        self,
        config: ReloraConfig,
        layers: dict[str, AdapterLinear],
        inner: TrainingOptimizer,
        num_steps: int,
        seed: int,
    ) -> None:
        super().__init__([inner])
        self._config, self._layers, self._inner = config, layers, inner
        self._num_steps, self._seed = num_steps, seed
        # Resets are rare: compiling would take longer than it saves.
        self._weights = FrozenWeights(layers, seed, compile_step=False)
        # The last reset does not follow from the number of steps: a run extended later had none at
        # its first end.
        self._counts = {"steps_done": 0, "num_resets": 0, "last_reset_step": 0}
        self._warmup_factor = 1.0

    def step(self) -> None:
        super().step()
        self._counts["steps_done"] += 1
        num_done = self._counts["steps_done"]
        if num_done % self._config.reset_interval == 0 and num_done < self._num_steps:
            self._counts["num_resets"] += 1
            self._counts["last_reset_step"] = num_done
            with region("reset"):
                self._reset()

    def set_lr(self, lr_factor: float) -> None:
        """Multiplies `lr_factor` by (steps since a reset + 1) / restart_warmup_steps, at most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a
        reset has a learning rate of zero.
        """
        self._warmup_factor = 1.0
        if self._counts["num_resets"] and self._config.restart_warmup_steps:
            num_since = self._counts["steps_done"] - self._counts["last_reset_step"]
            self._warmup_factor = min(1.0, (num_since + 1) / self._config.restart_warmup_steps)
        super().set_lr(lr_factor * self._warmup_factor)

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {
            "reset/resets_total": float(self._counts["num_resets"]),
            "reset/lr_factor": self._warmup_factor,
        }

    def replicated(self) -> dict[str, Tensor]:
        keys = {f"reset.{name}": tensor for name, tensor in self._weights.replicated().items()}
        return super().replicated() | keys

    def state_dict(self) -> dict[str, Tensor]:
        counts = {f"reset.{name}": torch.tensor(count) for name, count in self._counts.items()}
        return super().state_dict() | counts

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._counts = {name: int(state[f"reset.{name}"]) for name in self._counts}

    @torch.no_grad()
    def _reset(self) -> None:
        """Adds s B A to W, draws A as at initialization, and zeroes B (Algorithm 1). The layers'
        outputs do not change, with weights of 16 bits in expectation."""
        number = self._counts["num_resets"]
        # A generator: one layer's full factors are in memory at a time.
        products = (
            (index, full_tensor(layer.lora_a), full_tensor(layer.lora_b))
            for index, layer in enumerate(self._layers.values())
        )
        self._weights.add_products_(number, products)
        for name, layer in self._layers.items():
            key = generator_for(self._seed, f"{name}.lora_a:{number}").initial_seed()
            own = row_range(layer.lora_a)
            slots = torch.arange(own.start, own.stop, device=layer.lora_a.device)
            # Filled on the device: a copy from the host would synchronize.
            keys = torch.full((), key, device=slots.device)
            local(layer.lora_a).copy_(draw_vectors(keys, slots, layer.in_features, layer.bounds[0]))
            local(layer.lora_b).zero_()
        self._reset_moments(number)
        logger.info("reset %d: merged and reinitialized all factors", number)

    def _reset_moments(self, number: int) -> None:
        state, how = self._inner.state_dict(), self._config.reset_moments
        for factor in [f"{name}.{factor}" for name in self._layers for factor in FACTORS]:
            moments = state[f"{factor}.exp_avg"], state[f"{factor}.exp_avg_sq"]
            if how == "zero":
                for moment in moments:
                    local(moment).zero_()
                # Zero moments with an old step count would get no bias correction: updates of
                # (1 - beta1) / sqrt(1 - beta2), three times the rate with the usual betas.
                state[f"{factor}.step"].zero_()
            else:
                lots = generator_for(self._seed, f"{factor}.moments:{number}")
                prune_(*moments, self._config.prune_ratio, lots if how == "random" else None)


def prune_(
    exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float, generator: torch.Generator | None
) -> None:
    """Zeroes the smallest values of both moments, or random ones, the same in both.

    A first moment is zeroed with its second one, unlike in the authors' code: A's first gradient
    after a reset is zero, since B is, so Adam would divide the old first moment by eps.

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
    # Stable: ties must not change the count, and ranks must agree on which to keep.
    kept = flat.argsort(descending=True, stable=True)[:num_kept]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, kept, True).view(scores.shape)
