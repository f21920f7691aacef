"""Means, standard deviations and differences over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BySeed = Mapping[int, float]
"""One result of a row, by seed."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of a sample."""

    mean: float
    std: float | None
    """With Bessel's correction; None for a single value."""
    num: int

    @property
    def is_tie(self) -> bool:
        """Of differences: whether the mean is within one standard deviation of zero."""
        return self.std is not None and abs(self.mean) <= self.std


def summarize(values: Sequence[float]) -> Summary:
    """Returns mean and standard deviation; the mean is inf if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return Summary(math.inf, None, len(values))
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""Student's t at 97.5 % for 1 to 20 degrees of freedom; the last one is used for more."""


def interval_of_mean(mean: float, std: float | None, num: int) -> tuple[float, float] | None:
    """Returns the 95 % interval of the mean of a normal sample; None for a single value."""
    if std is None or num < 2:
        return None
    half = _T_QUANTILES[min(num - 1, len(_T_QUANTILES)) - 1] * std / math.sqrt(num)
    return mean - half, mean + half


def difference(row: BySeed, baseline: BySeed) -> Summary | None:
    """Returns row minus baseline, seed by seed; None without a shared seed.

    Runs with the same seed share data order and initial weights.
    """
    shared = sorted(row.keys() & baseline.keys())
    return summarize([row[seed] - baseline[seed] for seed in shared]) if shared else None


def share_of_gap(row: BySeed, start: BySeed, end: BySeed) -> Summary | None:
    """Computes the share of the difference from `start` to `end` that a row closes.

    Returns:
        The ratio of the mean differences over the seeds that all three share, and its standard
        deviation by the jackknife (leaving out one seed at a time): ratios of single seeds have no
        mean if a difference may be near zero. None without a shared seed or a difference.
    """
    shared = sorted(row.keys() & start.keys() & end.keys())
    if not shared:
        return None
    way = np.array([start[seed] - row[seed] for seed in shared])
    gap = np.array([start[seed] - end[seed] for seed in shared])
    if not np.isfinite(way).all() or not np.isfinite(gap).all() or gap.mean() == 0:
        return None
    num = len(shared)
    if num == 1:
        return Summary(float(way[0] / gap[0]), None, 1)
    gaps_left = np.array([np.delete(gap, i).mean() for i in range(num)])
    if (gaps_left == 0).any():
        return Summary(float(way.mean() / gap.mean()), None, num)
    left_out = np.array([np.delete(way, i).mean() for i in range(num)]) / gaps_left
    # The standard error of the mean, times sqrt(n): a standard deviation as for the other results.
    error = math.sqrt((num - 1) / num * float(((left_out - left_out.mean()) ** 2).sum()))
    return Summary(float(way.mean() / gap.mean()), error * math.sqrt(num), num)
