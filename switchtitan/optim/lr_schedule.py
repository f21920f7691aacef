"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from switchtitan.registry import Section


class LRScheduleConfig(Section):
    """`[lr_schedule]`: the factor on the peak learning rate."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the factor rises linearly from 1 / warmup_steps to 1."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """How the factor falls from 1 to `min_factor` over the rest of the run."""
    min_factor: float = Field(default=0.1, ge=0, le=1)
    """The factor at the end of the run, in [0, 1]. Not with constant."""

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        if self.decay == "constant" and not self.is_default("min_factor"):
            return [f'min_factor = {self.min_factor} has no effect with decay = "constant"']
        return []


def build_lr_schedule(config: LRScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Returns a function from the step, 0, ..., `num_steps` - 1, to the factor on the peak learning
    rate.

    Warm-up: (step + 1) / warmup_steps. Then it falls from 1 to `min_factor`, reached at
    `num_steps`.
    """

    def lr_factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return 1.0
        progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        remaining = (
            1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        )
        return config.min_factor + (1 - config.min_factor) * remaining

    return lr_factor
