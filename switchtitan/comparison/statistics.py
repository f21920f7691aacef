"""Means and differences over seeds, with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit  # scipy.stats takes seconds to import

BySeed = Mapping[int, float]
"""One result of a row, by seed."""
LEVEL = 0.05
"""Two equal rows are called different with at most this probability."""


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation of a sample."""

    mean: float
    std: float | None
    """With Bessel's correction; None for a single value."""
    num: int


@dataclass(frozen=True)
class Difference(Summary):
    """A row minus another one, seed by seed: the paired t-test."""

    low: float | None
    """Lower end of the 95 % interval of the mean; None for a single seed or a diverged run."""
    high: float | None
    p: float | None
    """Probability of a mean this far from zero if both rows are equal: two-sided, not adjusted."""

    @property
    def holds_zero(self) -> bool:
        """Whether the interval holds zero, or is not known."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high


def summarize(values: Sequence[float]) -> Summary:
    """Returns mean and standard deviation; the mean is inf if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return Summary(math.inf, None, len(values))
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Summary(float(np.mean(values)), std, len(values))


def difference(row: BySeed, baseline: BySeed) -> Difference | None:
    """Returns row minus baseline, seed by seed; None without a shared seed.

    Runs with the same seed share data order and initial weights.
    """
    shared = sorted(row.keys() & baseline.keys())
    if not shared:
        return None
    of = summarize([row[seed] - baseline[seed] for seed in shared])
    if of.std is None:
        return Difference(of.mean, None, of.num, None, None, None)
    error = of.std / math.sqrt(of.num)
    half = float(stdtrit(of.num - 1, 1 - LEVEL / 2)) * error
    if error == 0:
        p = 1.0 if of.mean == 0 else 0.0
    else:
        p = float(2 * stdtr(of.num - 1, -abs(of.mean) / error))
    return Difference(of.mean, of.std, of.num, of.mean - half, of.mean + half, p)


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Returns Holm's adjusted p-values of the rows whose p-value is known.

    Calling a row different if its adjusted p-value is below 5 % calls any of several equal rows
    different with a probability of at most 5 %, whether or not the rows depend on each other.
    (Holm 1979, "A simple sequentially rejective multiple test procedure")
    """
    known = sorted((p, row) for row, p in p_values.items() if p is not None)
    largest = 0.0
    result = {}
    for place, (p, row) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - place) * p))
        result[row] = largest
    return result


def verdict(of: Difference, adjusted_p: float | None) -> str | None:
    """Returns what a difference shows, in words; None for a single seed or a diverged run."""
    if of.p is None or adjusted_p is None:
        return None
    if of.holds_zero:
        return "no difference shown"
    return "differs" if adjusted_p < LEVEL else "no difference shown after Holm's correction"
