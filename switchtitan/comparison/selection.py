"""Choosing each row's learning rate, and widening the grid where the best is at its edge."""

from collections.abc import Mapping, Sequence

Losses = Mapping[float, float]
"""Validation loss by learning rate; inf where the run diverged."""


def best_rate(losses: Losses) -> float:
    """The rate of the lowest loss; the lower rate where two are equal."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_interior(losses: Losses) -> bool:
    """Whether the best rate lies between two others."""
    return min(losses) < best_rate(losses) < max(losses)


def widened(rates: Sequence[float], losses: Losses) -> list[float]:
    """The rates and one more, at the end nearest to the best one, in the ratio of the two rates there.

    For a best rate in the middle, the end whose loss is lower counts as nearer.
    """
    rates = sorted(rates)
    place = rates.index(best_rate(losses))
    from_low, from_high = place, len(rates) - 1 - place
    goes_up = from_high < from_low or (
        from_high == from_low and losses[rates[-1]] < losses[rates[0]]
    )
    if goes_up:
        return [*rates, _rounded(rates[-1] * rates[-1] / rates[-2])]
    return [_rounded(rates[0] * rates[0] / rates[1]), *rates]


def _rounded(rate: float) -> float:
    """To three digits, so that names stay short."""
    return float(f"{rate:.3g}")
