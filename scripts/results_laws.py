"""How the losses of rows depend on the size of the model, fitted over sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares

from switchtitan.comparison.statistics import BySeed, Difference, mean_over_seeds

Sizes = Mapping[float, BySeed]
"""Losses of a row by number of parameters, and by seed."""


_FIXED = 1e-9
"""Width of the bounds of an E that is given, in nats per token."""


@dataclass(frozen=True)
class Law:
    """L = E + A (N / N0)^-a of a row, with N0 the smallest size. Means over fits of each seed."""

    scale: Difference
    """A, in nats per token: what the loss of the smallest model has above E."""
    exponent: Difference
    """a: the excess over E halves when N grows by 2^(1/a)."""


@dataclass(frozen=True)
class Laws:
    """Laws of several rows with one E, the loss that no size goes below."""

    floors: BySeed
    """E of each seed's fit."""
    rows: dict[str, Law]


def fit_laws(losses: Mapping[str, Sizes], floor: float | None = None) -> Laws:
    """Fits L = E + A (N / N0)^-a to the rows, with one E for all, for each seed by itself.

    With the least sum of squares in L. (Form: Kaplan et al. 2020, arXiv 2001.08361, and Hoffmann
    et al. 2022, arXiv 2203.15556, with tokens in proportion to N.)

    Args:
        losses: row -> sizes; all rows have the same sizes and seeds.
        floor: E; fitted unless it is given.

    Returns:
        means over seeds with their 95 % intervals. They hold what differs from seed to seed, not
        the error of the form.

    Raises:
        ValueError: if there are fewer than three sizes, if rows have different sizes or seeds, or
            if a run diverged.
    """
    sizes = sorted(next(iter(losses.values())))
    seeds = sorted(next(iter(losses.values()))[sizes[0]])
    if len(sizes) < 3:
        raise ValueError(f"a law has three parameters, and there are only {len(sizes)} sizes")
    for row, of_row in losses.items():
        if sorted(of_row) != sizes or any(sorted(of_row[size]) != seeds for size in sizes):
            raise ValueError(f"row {row} has other sizes or seeds than the first row")
        if not all(math.isfinite(loss) for of_size in of_row.values() for loss in of_size.values()):
            raise ValueError(f"row {row} has a run that diverged, so no law can be fitted to it")
    fits = {
        seed: _fit(
            np.array(sizes) / sizes[0],
            np.array([[losses[row][size][seed] for size in sizes] for row in losses]),
            floor,
        )
        for seed in seeds
    }
    return Laws(
        {seed: fitted for seed, (fitted, _, _) in fits.items()},
        {
            row: Law(
                mean_over_seeds({seed: scales[place] for seed, (_, scales, _) in fits.items()}),
                mean_over_seeds({seed: powers[place] for seed, (_, _, powers) in fits.items()}),
            )
            for place, row in enumerate(losses)
        },
    )


def _fit(
    sizes: NDArray[np.float64], losses: NDArray[np.float64], floor: float | None
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Fits the laws of one seed.

    Args:
        sizes: [sizes], relative to the smallest.
        losses: [rows, sizes].
        floor: E, or None.

    Returns:
        E, and the A [rows] and a [rows] of each row.
    """
    num_rows, lowest = len(losses), losses.min()
    # From zero to the lowest loss, or as good as fixed.
    lower, upper = (0.0, lowest) if floor is None else (floor - _FIXED, floor + _FIXED)

    def residuals(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        scales, exponents = parameters[1:].reshape(2, num_rows, 1)
        return (parameters[0] + scales * sizes**-exponents - losses).ravel()

    def fit_from(start_floor: float) -> OptimizeResult:
        # With E known, the logarithm of the excess is linear in that of the size.
        slopes, starts = np.polyfit(np.log(sizes), np.log(losses - start_floor).T, 1)
        start = np.concatenate([[start_floor], np.exp(starts), -slopes])
        bounds = ([lower] + [-np.inf] * 2 * num_rows, [upper] + [np.inf] * 2 * num_rows)
        return least_squares(residuals, start, bounds=bounds, x_scale="jac", xtol=1e-12)

    # The sum of squares can have several minima.
    starts = [share * lowest for share in (0.05, 0.3, 0.5, 0.7, 0.9)] if floor is None else [floor]
    best = min(map(fit_from, starts), key=lambda fit: float(fit.cost))
    if not best.success:
        raise ValueError(f"the law was not fitted: {best.message}")
    scales, exponents = best.x[1:].reshape(2, num_rows)
    return float(best.x[0]), scales, exponents


def per_doubling(distances: Sizes) -> Difference:
    """Returns how much a distance changes when the size doubles: the slope over log2 N by seed.

    Args:
        distances: of a row to full rank, by size and seed.
    """
    sizes = sorted(distances)
    seeds = sorted(distances[sizes[0]])
    slopes = {
        seed: float(np.polyfit(np.log2(sizes), [distances[size][seed] for size in sizes], 1)[0])
        for seed in seeds
    }
    return mean_over_seeds(slopes)
