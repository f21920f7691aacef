"""Frozen weights in 16-bit fixed point: their values, and what additions do to them."""

import math

import pytest
import torch
from support.tensors import draw

from switchtitan.numerics.fixed_point import (
    FIXED,
    NUM_EXTRA,
    add_fixed_,
    num_values,
    pack,
    random_words,
    steps_of,
    unpack,
)
from switchtitan.numerics.random import splitmix32

KEY = torch.tensor(5, dtype=torch.int32)
STEP = 2.0**-20


def values_of(rows):
    return unpack(rows, torch.float64)


def event(number):
    return splitmix32(KEY, torch.tensor(number, dtype=torch.int32))


def test_packed_rows_are_the_nearest_ones_of_the_finest_step_that_holds_them():
    weight = draw(7, 33) * torch.tensor([1e-6, 1e-3, 0.02, 1.0, 3.0, 400.0, 0.0])[:, None]
    rows = pack(weight)
    assert (rows.dtype, rows.shape) == (FIXED, (7, 33 + NUM_EXTRA))
    assert num_values(rows) == num_values(weight) == 7 * 33
    steps = steps_of(rows).double()
    assert bool(((values_of(rows) - weight.double()).abs() <= steps / 2).all())
    largest = weight.abs().amax(1, keepdim=True).double()
    # Half the step would not hold it, but for the least step.
    assert bool((largest / steps > 32767 / 2 - 1)[1:-1].all())
    assert values_of(rows)[-1].count_nonzero() == 0
    assert pack(torch.empty(0, 5)).shape == (0, 5 + NUM_EXTRA)
    rows = pack(draw(9, 65))  # and unpacking rounds once
    assert torch.equal(unpack(rows, torch.bfloat16), values_of(rows).bfloat16())


@pytest.mark.parametrize("fraction", [0.0, 2**-9, 0.3, 0.999])
def test_an_addition_has_the_right_mean_and_moves_each_value_to_a_neighbour(fraction):
    start = torch.full((64, 512), 20000 * STEP)
    packed, total, num = pack(start), 0.0, 40
    assert bool((steps_of(packed) == STEP).all())
    for number in range(num):
        rows = packed.clone()
        add_fixed_(
            rows,
            torch.full(start.shape, fraction * STEP / 2),
            event(number),
            first_row=0,
            scale=2.0,
        )
        moved = (values_of(rows) - start.double()) / STEP
        assert set(moved.unique().tolist()) <= {0.0, 1.0}
        total += moved.mean().item() / num
    deviation = math.sqrt(fraction * (1 - fraction) / (start.numel() * num))
    # Five deviations, and the 2^-16 that random bits have.
    assert abs(total - fraction) <= 5 * deviation + 2**-16


def test_a_row_that_outgrows_its_step_takes_a_larger_one_without_a_bias():
    weight = draw(4, 4096, seed=1) * 0.02
    weight[0] = 0
    rows, update = pack(weight), draw(4, 4096, seed=2) * 0.01
    update[1] *= 100  # a row that grows more than eightfold
    update[2] *= 1e8
    before = steps_of(rows).double()
    add_fixed_(rows, update, KEY, first_row=0, scale=1.0)
    exact = weight.double() + update.double()
    error = values_of(rows) - exact
    after = steps_of(rows).double()
    assert bool((after[:3] > before[:3]).all())
    assert bool((error.abs() <= 2 * after).all())
    # The error of a rounding is below a step, so the deviation of a row's mean is below 1 / 60.
    assert bool((error.mean(1, keepdim=True).abs() <= 5 * after / 64).all())


def test_a_row_that_is_not_finite_stays_so():
    values = torch.tensor([[math.inf, 0.5], [math.nan, 0.0], [1.0, 2.0], [0.0, 1.0]])
    rows = pack(values)
    for update in (math.nan, -math.inf, 1.0):
        add_fixed_(rows, torch.tensor([[0.0], [0.0], [update], [0.5]]), KEY, first_row=0, scale=1.0)
        is_finite = unpack(rows, torch.float32).isfinite()
        assert is_finite.tolist() == [[False] * 2] * 3 + [[True] * 2]


def test_bits_depend_on_the_place_in_the_full_weight_alone():
    weight, update = draw(6, 40), 1e-4 * draw(6, 40, seed=1)
    whole, parts = pack(weight), [pack(weight[:2]), pack(weight[2:])]
    add_fixed_(whole, update, KEY, first_row=0, scale=1.0)
    add_fixed_(parts[0], update[:2], KEY, first_row=0, scale=1.0)
    add_fixed_(parts[1], update[2:], KEY, first_row=2, scale=1.0)
    assert torch.equal(torch.cat(parts), whole)
    assert random_words(KEY, 0, 3, 5).dtype == torch.int32
