"""The learning rate over a run."""

import itertools
import math

import pytest
import torch

from switchtitan.optim import LRScheduleConfig, build_lr_schedule

NUM_STEPS, WARMUP = 37, 5
# Some roundings of numbers of order 1.
TOLERANCE = 1e-12


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, WARMUP, NUM_STEPS])
def test_warmup_rises_in_a_line_from_its_first_share_to_the_peak(decay: str, warmup_steps: int):
    lr_factor = build_lr_schedule(
        LRScheduleConfig(warmup_steps=warmup_steps, decay=decay), NUM_STEPS
    )
    for step in range(warmup_steps):
        assert lr_factor(step) == pytest.approx((step + 1) / warmup_steps, abs=TOLERANCE)
    assert lr_factor(warmup_steps if warmup_steps < NUM_STEPS else NUM_STEPS - 1) == 1.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("min_factor", [0.0, 0.1, 0.7])
def test_decay_falls_steadily_to_the_minimum(decay: str, min_factor: float):
    config = LRScheduleConfig(warmup_steps=WARMUP, decay=decay, min_factor=min_factor)
    factors = [build_lr_schedule(config, NUM_STEPS)(step) for step in range(WARMUP, NUM_STEPS + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))
    assert factors[0] == 1.0
    assert factors[-1] == pytest.approx(min_factor, abs=TOLERANCE)
    # Both fall by half of the way in the middle.
    middle = (NUM_STEPS - WARMUP) // 2
    assert factors[middle] == pytest.approx((1 + min_factor) / 2, abs=TOLERANCE)
    assert build_lr_schedule(config, NUM_STEPS)(NUM_STEPS + 9) == pytest.approx(
        min_factor, abs=TOLERANCE
    )


def test_constant_stays_at_the_peak():
    lr_factor = build_lr_schedule(
        LRScheduleConfig(warmup_steps=WARMUP, decay="constant"), NUM_STEPS
    )
    assert {lr_factor(step) for step in range(WARMUP, NUM_STEPS)} == {1.0}


def test_cosine_equals_torch_s_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS, eta_min=0.1)
    ours = build_lr_schedule(LRScheduleConfig(decay="cosine", min_factor=0.1), NUM_STEPS)
    for step in range(NUM_STEPS):
        # Theirs goes from each factor to the next, so that roundings add up.
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        theirs.step()


def test_a_run_that_only_warms_up_stays_finite():
    config = LRScheduleConfig(warmup_steps=NUM_STEPS, decay="linear")
    assert math.isfinite(build_lr_schedule(config, NUM_STEPS)(NUM_STEPS))
