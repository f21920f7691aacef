"""Differences over seeds, with 95 % intervals and corrected p-values."""

import math
from collections.abc import Mapping
from itertools import accumulate
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtr, stdtrit  # scipy.stats takes seconds to import

LEVEL = 0.05
"""Two equal rows are called different with at most this probability."""


class Difference(NamedTuple):
    """A row minus another one, seed by seed: the paired t-test."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval of the mean; None for a single seed."""
    p: float | None
    """Probability of a mean this far from zero if both rows are equal: two-sided, not adjusted."""

    def text(self, form: str) -> str:
        """Returns the mean and its interval as numbers of a format such as "+.4f"."""
        if self.half_width is None:
            return f"{self.mean:{form}} (one seed)"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:{form}} ({low:{form}} to {high:{form}})"


def difference(row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Returns row minus baseline, losses by seed; None without a shared seed, or if a run diverged.

    Runs with the same seed share data order and initial weights.
    """
    of = [row[seed] - baseline[seed] for seed in sorted(row.keys() & baseline.keys())]
    if not of or not all(map(math.isfinite, of)):
        return None
    mean, num = fmean(of), len(of)
    if num == 1:
        return Difference(mean, None, None)
    error = stdev(of) / math.sqrt(num)
    half_width = float(stdtrit(num - 1, 1 - LEVEL / 2)) * error
    if error == 0:
        return Difference(mean, half_width, 1.0 if mean == 0 else 0.0)
    return Difference(mean, half_width, float(2 * stdtr(num - 1, -abs(mean) / error)))


def adjusted(p_values: Mapping[str, float | None]) -> dict[str, float]:
    """Returns Holm's adjusted p-values of the rows whose p-value is known.

    Calling a row different if its adjusted p-value is below 5 % calls any of several equal rows
    different with a probability of at most 5 %, whether or not the rows depend on each other.
    (Holm 1979, "A simple sequentially rejective multiple test procedure")
    """
    known = sorted((p, row) for row, p in p_values.items() if p is not None)
    steps = (min(1.0, (len(known) - place) * p) for place, (p, _) in enumerate(known))
    return {row: p for (_, row), p in zip(known, accumulate(steps, max), strict=True)}


def verdict(p: float, adjusted_p: float) -> str:
    """Returns what a difference shows, in words. Its interval holds zero if p is at least 5 %."""
    if p >= LEVEL:
        return "no difference shown"
    return "differs" if adjusted_p < LEVEL else "no difference shown after Holm's correction"
