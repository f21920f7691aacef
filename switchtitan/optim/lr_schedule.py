"""The learning rate as a pure function of the step."""

import math
from collections.abc import Callable

from switchtitan.optim.config import LRScheduleConfig


def build_lr_schedule(config: LRScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """The factor by which the peak learning rate is multiplied at a step 0, 1, ..., `num_steps` - 1.

    Warm-up: (step + 1) / warmup_steps. Then from 1 down to `min_factor`, reached at step `num_steps`.
    """

    def lr_factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return 1.0
        progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
        remaining = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return config.min_factor + (1 - config.min_factor) * remaining

    return lr_factor
