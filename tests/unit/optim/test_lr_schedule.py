"""The learning rate over a run."""

import itertools

import pytest
import torch

from switchtitan.optim import LRScheduleConfig, build_lr_schedule

NUM_STEPS, WARMUP = 37, 5
# Some roundings of numbers of order 1.
TOLERANCE = 1e-12


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, WARMUP, NUM_STEPS])
def test_warmup_rises_in_a_line_from_its_first_share_to_the_peak(decay, warmup_steps):
    config = LRScheduleConfig(warmup_steps=warmup_steps, decay=decay)
    lr_factor = build_lr_schedule(config, NUM_STEPS)
    for step in range(warmup_steps):
        assert lr_factor(step) == pytest.approx((step + 1) / warmup_steps, abs=TOLERANCE)
    assert lr_factor(min(warmup_steps, NUM_STEPS - 1)) == 1.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("min_factor", [0.0, 0.1, 0.7])
def test_decay_falls_steadily_to_the_minimum(decay, min_factor):
    config = LRScheduleConfig(warmup_steps=WARMUP, decay=decay, min_factor=min_factor)
    lr_factor = build_lr_schedule(config, NUM_STEPS)
    factors = [lr_factor(step) for step in range(WARMUP, NUM_STEPS + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(factors))
    assert factors[0] == 1.0
    # Both fall by half of the way in the middle.
    middle = factors[(NUM_STEPS - WARMUP) // 2]
    assert middle == pytest.approx((1 + min_factor) / 2, abs=TOLERANCE)
    for last in (factors[-1], lr_factor(NUM_STEPS + 9)):
        assert last == pytest.approx(min_factor, abs=TOLERANCE)


def test_constant_stays_at_the_peak():
    config = LRScheduleConfig(warmup_steps=WARMUP, decay="constant")
    lr_factor = build_lr_schedule(config, NUM_STEPS)
    assert {lr_factor(step) for step in range(WARMUP, NUM_STEPS)} == {1.0}


def test_cosine_equals_torchs_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS, eta_min=0.1)
    ours = build_lr_schedule(LRScheduleConfig(decay="cosine", min_factor=0.1), NUM_STEPS)
    for step in range(NUM_STEPS):
        # Theirs goes from each factor to the next, so that roundings add up.
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        theirs.step()
