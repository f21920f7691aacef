"""Chooses the best value of a key, and widens a grid of rates if the best one is at its edge."""

from collections.abc import Mapping, Sequence

Losses = Mapping[float, float]
"""Validation loss by value; inf if the run diverged."""


def is_rate(key: str) -> bool:
    """Whether a dotted key is a learning rate, whose values are spaced by ratios and widened."""
    name = key.rpartition(".")[2]
    return name == "lr" or name.endswith("_lr")


def best_value(losses: Losses) -> float:
    """Returns the value of the lowest loss; of equal losses, the lowest value."""
    return min(sorted(losses), key=lambda value: losses[value])


def is_interior(losses: Losses) -> bool:
    """Whether the best value is between two others."""
    return min(losses) < best_value(losses) < max(losses)


def widened(rates: Sequence[float], losses: Losses) -> list[float]:
    """Returns the rates and one more, at the end nearest to the best rate.

    The ratio of the two rates at that end determines the new rate. If the best rate is in the
    middle, the end with the lower loss counts as nearest.
    """
    rates = sorted(rates)
    place = rates.index(best_value(losses))
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
