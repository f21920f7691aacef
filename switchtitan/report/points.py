"""Curves of bounded length that keep their lowest and highest points."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_POINTS_OF_CURVE = 2_000
MAX_POINTS = 400_000
"""Points of all curves of a report, at most: about 9 MB of its file."""
_POINTS_OF_BUCKET = 4
"""Its lowest, its highest, its first that is not finite, and its mean."""
_DIGITS = 7
"""Of a value: event files store float32."""

Points = dict[str, list]
"""`x`, `y` and, of a mean, `deviation`; of a shortened curve also `mean_x` and `mean_y`, means of
its buckets."""


def points_of_curve(num_curves: int, max_points: int) -> int:
    """Returns how many points each of so many curves may have, at most `max_points` together."""
    fair = max_points // max(1, num_curves)
    return max(2 + _POINTS_OF_BUCKET, min(MAX_POINTS_OF_CURVE, fair))


class Line(NamedTuple):
    """A curve: places, values and, of a mean, the standard deviation of each value."""

    x: Sequence[float]
    y: Sequence[float]
    deviation: Sequence[float] | None = None


def shorten(line: Line, max_points: int) -> Points:
    """Returns at most `max_points` points of a curve, sorted by `x`.

    Cuts a longer curve into buckets of equally many points and keeps of each the lowest, the
    highest and the first that is not finite, so that no spike is lost; and the ends. Smoothing
    needs means instead of extremes, so the buckets' means are returned too.
    """
    order = np.argsort(np.asarray(line.x), kind="stable")
    places = np.asarray(line.x)[order]
    values = np.asarray(line.y, dtype=np.float64)[order]
    if len(values) <= max_points:
        return _chosen(line, order, places, values, np.arange(len(values)))
    num_buckets = max(1, (max_points - 2) // _POINTS_OF_BUCKET)
    kept, mean_places, means = {0, len(values) - 1}, [], []
    for bucket in np.array_split(np.arange(len(values)), num_buckets):
        is_finite = np.isfinite(values[bucket])
        finite = bucket[is_finite]
        if len(finite):
            kept |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            mean_places.append(float(places[finite].mean()))
            means.append(float(values[finite].mean()))
        if len(finite) < len(bucket):
            kept.add(int(bucket[~is_finite][0]))
    shown = _chosen(line, order, places, values, np.array(sorted(kept)))
    return shown | {"mean_x": plain(mean_places), "mean_y": plain(means)}


def _chosen(
    line: Line, order: np.ndarray, places: np.ndarray, values: np.ndarray, chosen: np.ndarray
) -> Points:
    points: Points = {"x": places[chosen].tolist(), "y": plain(values[chosen])}
    if line.deviation is not None:
        points["deviation"] = plain(np.asarray(line.deviation)[order][chosen])
    return points


def plain(values: Sequence[float] | np.ndarray) -> list[float | str]:
    """Rounds values to the digits shown; those that JSON does not have become strings."""
    return [
        float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else str(float(value))
        for value in values
    ]
