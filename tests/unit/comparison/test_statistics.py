import math

import numpy as np
import pytest

from switchtitan.comparison.statistics import difference, share_of_gap, summarize


def test_mean_and_deviation_of_a_sample():
    summary = summarize([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    # ((4/3)^2 + (1/3)^2 + (5/3)^2) / 2 = 7/3
    assert summary.std == pytest.approx(math.sqrt(7 / 3))
    assert summarize([5.0]).std is None
    assert summarize([1.0, math.inf]).mean == math.inf


def test_a_difference_is_taken_seed_by_seed():
    # Seeds differ by 1, rows by 0.1 with each seed. A pooled deviation would hide this difference.
    row, baseline = {2: 1.1, 3: 2.1, 4: 3.1, 9: 7.0}, {2: 1.0, 3: 2.0, 4: 3.0}
    summary = difference(row, baseline)
    assert (summary.mean, summary.num) == (pytest.approx(0.1), 3)
    assert summary.std == pytest.approx(0.0, abs=1e-12)
    assert not summary.is_tie
    assert difference({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(
    ("change", "is_tie"), [([0.1, -0.1, 0.05], True), ([0.1, 0.3, 0.2], False)]
)
def test_a_difference_smaller_than_its_deviation_is_a_tie(change, is_tie):
    assert difference(dict(enumerate(change)), dict.fromkeys(range(3), 0.0)).is_tie is is_tie


def test_share_of_a_gap_is_the_ratio_of_mean_differences():
    start, end = {1: 2.0, 2: 2.1, 3: 1.9}, {1: 1.0, 2: 1.0, 3: 1.0}
    assert share_of_gap(end, start, end).mean == pytest.approx(1.0)
    assert share_of_gap(start, start, end).mean == pytest.approx(0.0)
    half = share_of_gap({seed: (start[seed] + end[seed]) / 2 for seed in start}, start, end)
    assert half.mean == pytest.approx(0.5)
    assert half.std == pytest.approx(0.0, abs=1e-12)
    assert share_of_gap(start, start, start) is None
    assert share_of_gap({1: math.inf}, {1: 2.0}, {1: 1.0}) is None


def test_the_deviation_of_a_share_is_that_of_new_samples():
    # With many seeds and a gap far from zero, the jackknife agrees with the deviation of the
    # ratio's first-order change.
    draws = np.random.default_rng(0)
    num = 4000
    start = 2.0 + 0.1 * draws.standard_normal(num)
    row = 1.5 + 0.1 * draws.standard_normal(num)
    end = 1.0 + 0.1 * draws.standard_normal(num)
    share = share_of_gap(*(dict(enumerate(values)) for values in (row, start, end)))
    way, gap = start - row, start - end
    first_order = (way - share.mean * gap) / gap.mean()
    assert share.std == pytest.approx(first_order.std(ddof=1), rel=1e-3)
