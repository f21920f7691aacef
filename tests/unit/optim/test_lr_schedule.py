"""The learning rate over a run."""

import math

import pytest

from switchtitan.optim.lr_schedule import LRScheduleConfig, build_lr_schedule

NUM_STEPS = 37
FORMULAS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


@pytest.mark.parametrize("decay", FORMULAS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 5, NUM_STEPS])
@pytest.mark.parametrize("min_factor", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(("decay_ratio", "num_falling"), [(None, NUM_STEPS), (0.2, 7)])
def test_it_rises_in_a_line_to_the_peak_stays_there_and_falls_to_the_minimum(
    decay, warmup_steps, min_factor, decay_ratio, num_falling
):
    keys = {"decay": decay, "min_factor": min_factor, "decay_ratio": decay_ratio}
    lr_factor = build_lr_schedule(LRScheduleConfig(warmup_steps=warmup_steps, **keys), NUM_STEPS)
    start = max(warmup_steps, NUM_STEPS - num_falling)
    for step in range(NUM_STEPS + 9):
        if step < warmup_steps:
            expected = (step + 1) / warmup_steps
        elif step <= start:
            expected = 1.0
        else:
            is_last = step >= NUM_STEPS
            progress = 1 if is_last else (step - start) / (NUM_STEPS - start)
            expected = min_factor + (1 - min_factor) * FORMULAS[decay](progress)
        # Some roundings of numbers of order 1.
        assert lr_factor(step) == pytest.approx(expected, abs=1e-12)
