"""Intervals and tests, against scipy.stats and closed forms."""

import math

import numpy as np
import pytest

from switchtitan.workbench.comparison.statistics import adjusted, difference


@pytest.mark.parametrize("num", [2, 3, 5, 8, 40])
def test_intervals_and_p_values_are_those_of_scipys_paired_t_test(num):
    from scipy import stats

    draws = np.random.default_rng(num)
    row, baseline = draws.normal(2.9, 0.1, num), draws.normal(3.0, 0.1, num)
    paired = stats.ttest_rel(row, baseline)
    found = difference(dict(enumerate(row)), dict(enumerate(baseline)))
    assert found.mean == pytest.approx(row.mean() - baseline.mean())
    assert found.p == pytest.approx(paired.pvalue)
    interval = (found.mean - found.half_width, found.mean + found.half_width)
    assert interval == pytest.approx(tuple(paired.confidence_interval(0.95)))


def test_a_single_seed_and_a_diverged_run_show_no_difference():
    assert difference({1: 1.0, 9: 7.0}, {1: 2.0}) == (-1.0, None, None)
    assert difference({1: 1.0}, {2: 1.0}) is None
    assert difference({1: 1.0, 2: math.inf}, {1: 2.0, 2: 2.0}) is None
    assert difference({1: 1.0, 2: math.inf}, {1: 2.0, 2: math.inf}) is None
    assert difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p == 1.0
    assert difference({1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5}).p == 0.0


def test_adjusted_p_values_are_holms():
    # Sorted: 4 * 0.01, 3 * 0.015, 2 * 0.03 and 0.04, which may not be below the one before.
    found = adjusted({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.015, "one seed": None})
    assert found == pytest.approx({"b": 0.04, "d": 0.045, "c": 0.06, "a": 0.06})
    assert adjusted({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert adjusted({}) == {}
