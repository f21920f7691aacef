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
    """How the factor falls from 1 to `min_factor` at the end of the run."""
    decay_ratio: float | None = Field(default=None, gt=0, le=1)
    """Share of the run, in (0, 1], over whose last steps the factor falls; it stays at 1 before
    (warm-up, stable, decay: WSD), and a run of another length can resume from there. Default: the
    factor falls from the end of the warm-up on. Not with constant."""
    min_factor: float = Field(default=0.1, ge=0, le=1)
    """The factor at the end of the run, in [0, 1]. Not with constant."""

    def without_effect(self) -> list[str]:
        return [
            f'{key} = {getattr(self, key)} has no effect with decay = "constant"'
            for key in ("min_factor", "decay_ratio")
            if self.decay == "constant" and not self.is_default(key)
        ]

    def decay_start(self, num_steps: int) -> int:
        """Returns the step from which the factor falls; `num_steps` if it does not."""
        if self.decay == "constant":
            return num_steps
        share = 1.0 if self.decay_ratio is None else self.decay_ratio
        return max(self.warmup_steps, num_steps - max(1, round(share * num_steps)))


def build_lr_schedule(config: LRScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Returns a function from the step, 0, ..., `num_steps` - 1, to the factor on the peak learning
    rate.

    Warm-up: (step + 1) / warmup_steps. Then 1, until it falls to `min_factor`, reached at
    `num_steps`.
    """
    start = config.decay_start(num_steps)

    def lr_factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return 1.0
        progress = min(1.0, max(0, step - start) / max(1, num_steps - start))
        remaining = (
            1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        )
        return config.min_factor + (1 - config.min_factor) * remaining

    return lr_factor
