"""Medians, and ratios that are robust to slowdowns of the machine."""

import numpy as np
import pytest

from switchtitan.benchmark.step_times import StepTimes, ratio_of_steps


def times_of(step_s: np.ndarray) -> StepTimes:
    return StepTimes(step_s, step_s * 0.7, step_s * 0.2, tokens_per_step=120)


def test_medians_and_speed_are_over_all_steps() -> None:
    times = times_of(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 100.0]]))
    assert times.median_s == 3.5
    assert times.quartiles_s == (2.25, 4.75)
    assert times.tokens_per_s == pytest.approx(120 / 3.5)


def test_a_slowdown_of_both_does_not_change_the_ratio() -> None:
    rng = np.random.default_rng(3)
    step_s = 1 + 0.01 * rng.random((9, 5))
    slowdown = np.where(np.arange(9) % 4 == 1, 7.0, 1.0)[:, None]
    reference, other = times_of(step_s * slowdown), times_of(1.5 * step_s[:, ::-1] * slowdown)
    ratio = ratio_of_steps(other, reference)
    # The same numbers in another order: equal but for rounding.
    assert ratio.value == pytest.approx(1.5, rel=1e-12)
    assert ratio.low == pytest.approx(1.5, rel=1e-12)
    assert ratio.high == pytest.approx(1.5, rel=1e-12)


def test_the_interval_covers_the_true_ratio_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(8)
    num_trials, hits = 200, 0
    for _ in range(num_trials):
        reference, other = (
            times_of(mean * np.exp(0.1 * rng.normal(size=(15, 4)))) for mean in (1.0, 1.2)
        )
        ratio = ratio_of_steps(other, reference)
        assert ratio.low <= ratio.value <= ratio.high
        hits += ratio.low <= 1.2 <= ratio.high
    # Nominally 95 %; four binomial deviations, sqrt(0.95 * 0.05 / 200) = 1.5 %, below it.
    assert hits / num_trials >= 0.89


def test_a_configuration_compared_with_itself_has_ratio_one() -> None:
    times = times_of(np.random.default_rng(1).random((4, 3)) + 1)
    ratio = ratio_of_steps(times, times)
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_times_with_different_numbers_of_rounds_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="4 rounds and 5 rounds: not timed side by side"):
        ratio_of_steps(times_of(np.ones((4, 2))), times_of(np.ones((5, 2))))
