"""Chooses each row's learning rate, and widens the grid if the best rate is at its edge."""

from collections.abc import Mapping, Sequence

Losses = Mapping[float, float]
"""Validation loss by learning rate; inf if the run diverged."""


def best_rate(losses: Losses) -> float:
    """Returns the rate of the lowest loss; of equal losses, the lowest rate."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_interior(losses: Losses) -> bool:
    """Whether the best rate is between two others."""
    return min(losses) < best_rate(losses) < max(losses)


def widened(rates: Sequence[float], losses: Losses) -> list[float]:
    """Returns the rates and one more, at the end nearest to the best rate.

    The ratio of the two rates at that end determines the new rate. If the best rate is in the
    middle, the end with the lower loss counts as nearest.
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
    """Rounds to three digits, which keeps names short."""
    return float(f"{rate:.3g}")
