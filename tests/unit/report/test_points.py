"""Shortened curves: bounded, with every extreme, and unchanged if they are short."""

import math
import random

import pytest

from switchtitan.report.points import (
    MAX_POINTS,
    MAX_POINTS_OF_CURVE,
    Line,
    plain,
    points_of_curve,
    shorten,
)


def noise(num: int) -> list[float]:
    draw = random.Random(1)
    return [draw.gauss(3.0, 1.0) for _ in range(num)]


def test_a_short_curve_is_kept_and_sorted() -> None:
    assert shorten(Line([3, 1, 2], [0.3, 0.1, 0.2]), 10) == {"x": [1, 2, 3], "y": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize("max_points", [6, 50, MAX_POINTS_OF_CURVE])
def test_a_long_curve_keeps_its_ends_and_extremes_within_the_bound(max_points: int) -> None:
    steps, values = list(range(100_000)), noise(100_000)
    values[31_415], values[92_653] = -50.0, 60.0
    points = shorten(Line(steps, values), max_points)
    kept = dict(zip(points["x"], points["y"], strict=True))
    assert len(kept) + len(points["mean_x"]) <= max_points
    assert kept[31_415] == -50.0
    assert kept[92_653] == 60.0
    assert {0, 99_999} <= kept.keys()
    assert points["x"] == sorted(points["x"])
    assert all(kept[step] == plain([values[step]])[0] for step in kept)


def test_every_bucket_keeps_its_extremes_and_mean() -> None:
    values = noise(10_000)
    points = shorten(Line(list(range(10_000)), values), 402)
    kept = set(points["x"])
    for start in range(0, 10_000, 100):
        bucket = range(start, start + 100)
        assert min(bucket, key=lambda step: values[step]) in kept
        assert max(bucket, key=lambda step: values[step]) in kept
    # The mean of equally large buckets' means is the mean, up to rounding to seven digits.
    assert sum(points["mean_y"]) / 100 == pytest.approx(sum(values) / 10_000, rel=1e-6)


def test_values_that_are_not_finite_are_kept_as_text() -> None:
    values = noise(5_000)
    values[777] = math.nan
    values[4_000:] = [math.inf] * 1_000
    points = shorten(Line(list(range(5_000)), values), 100)
    kept = dict(zip(points["x"], points["y"], strict=True))
    assert kept[777] == "nan"
    assert kept[4_999] == "inf"
    assert all(isinstance(mean, float) for mean in points["mean_y"])


def test_deviations_stay_with_their_points() -> None:
    steps, values = list(range(3_000)), noise(3_000)
    points = shorten(Line(steps, values, [2 * value for value in values]), 60)
    doubled = [2 * value for value in points["y"]]
    assert points["deviation"] == pytest.approx(doubled, rel=1e-6)


@pytest.mark.parametrize("num_curves", [0, 1, 10, 1_000, 60_000])
def test_all_curves_of_a_report_share_its_points(num_curves: int) -> None:
    of_each = points_of_curve(num_curves, MAX_POINTS)
    assert num_curves * of_each <= MAX_POINTS
    assert 6 <= of_each <= MAX_POINTS_OF_CURVE
