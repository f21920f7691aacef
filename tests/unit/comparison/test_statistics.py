"""Intervals and tests, against scipy.stats, closed forms and simulated tables."""

import math

import numpy as np
import pytest

from switchtitan.comparison.statistics import (
    LEVEL,
    adjusted,
    difference,
    summarize,
)

NUM_TABLES = 1000
BOUND = 3.3 * math.sqrt(0.05 * 0.95 / NUM_TABLES)
"""A rate of 5 % in so many simulated tables is further away with a probability of 0.1 %."""


@pytest.fixture(scope="module")
def stats():
    from scipy import stats

    return stats


def by_seed(values):
    return dict(enumerate(values))


def test_mean_and_deviation_of_a_sample():
    summary = summarize([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    # ((4/3)^2 + (1/3)^2 + (5/3)^2) / 2 = 7/3
    assert summary.std == pytest.approx(math.sqrt(7 / 3))
    assert summarize([5.0]).std is None
    assert summarize([1.0, math.inf]).mean == math.inf


@pytest.mark.parametrize("num", [2, 3, 5, 8, 40])
def test_intervals_and_differences_are_those_of_scipys_t_tests(stats, num):
    draws = np.random.default_rng(num)
    row, baseline = draws.normal(2.9, 0.1, num), draws.normal(3.0, 0.1, num)
    paired = stats.ttest_rel(row, baseline)
    found = difference(by_seed(row), by_seed(baseline))
    assert found.mean == pytest.approx(row.mean() - baseline.mean())
    assert found.p == pytest.approx(paired.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval(0.95)))
    assert found.holds_zero == (paired.pvalue > LEVEL)


def test_a_difference_is_taken_seed_by_seed():
    # Seeds differ by 1, rows by 0.1 with each seed. A pooled deviation would hide this difference.
    row, baseline = {2: 1.1, 3: 2.1, 4: 3.1, 9: 7.0}, {2: 1.0, 3: 2.0, 4: 3.0}
    found = difference(row, baseline)
    assert (found.mean, found.num) == (pytest.approx(0.1), 3)
    assert found.std == pytest.approx(0.0, abs=1e-12)
    assert not found.holds_zero
    assert difference({1: 1.0}, {2: 1.0}) is None


def test_a_single_seed_and_a_diverged_run_show_no_difference():
    for row in ({1: 1.0}, {1: 1.0, 2: math.inf}):
        found = difference(row, dict.fromkeys(row, 2.0))
        assert (found.low, found.high, found.p) == (None, None, None)
        assert found.holds_zero
    assert difference({1: 1.0, 2: 2.0}, {1: 1.0, 2: 2.0}).p == 1.0
    assert difference({1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5}).p == 0.0


def test_adjusted_p_values_are_holms():
    # Sorted: 4 * 0.01, 3 * 0.015, 2 * 0.03 and 0.04, which may not be below the one before.
    found = adjusted({"a": 0.04, "b": 0.01, "c": 0.03, "d": 0.015, "diverged": None})
    assert found == pytest.approx({"b": 0.04, "d": 0.045, "c": 0.06, "a": 0.06})
    assert adjusted({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert adjusted({}) == {}


@pytest.mark.parametrize("num_seeds", [3, 5])
def test_equal_rows_are_called_different_in_five_percent_of_tables(num_seeds):
    draws = np.random.default_rng(0)
    called = 0
    for _ in range(NUM_TABLES):
        # Seeds shift both rows alike.
        seeds = draws.normal(3.0, 0.1, num_seeds)
        row, baseline = (seeds + draws.normal(0.0, 0.02, num_seeds) for _ in range(2))
        called += not difference(by_seed(row), by_seed(baseline)).holds_zero
    assert called / NUM_TABLES == pytest.approx(LEVEL, abs=BOUND)


def test_a_table_of_equal_rows_has_a_difference_in_at_most_five_percent_of_cases():
    draws = np.random.default_rng(1)
    num_seeds, num_rows = 5, 7
    with_holm = without = 0
    for _ in range(NUM_TABLES):
        seeds = draws.normal(3.0, 0.1, num_seeds)
        baseline = by_seed(seeds + draws.normal(0.0, 0.02, num_seeds))
        p_values = {
            str(row): difference(by_seed(seeds + draws.normal(0.0, 0.02, num_seeds)), baseline).p
            for row in range(num_rows)
        }
        with_holm += min(adjusted(p_values).values()) < LEVEL
        without += min(p_values.values()) < LEVEL
    assert with_holm / NUM_TABLES <= LEVEL + BOUND
    # Without the correction, seven rows are called different far more often.
    assert without / NUM_TABLES > 3 * LEVEL
