"""Chooses the values of each row's tuned keys, one key after the other.

A pure function of the losses so far: it says which runs are due, or which values are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from switchtitan.comparison.config import ComparisonConfig, RowConfig, is_rate
from switchtitan.comparison.plan import Run, plan_run

FindLoss = Callable[[Run], float | None]
"""Returns the validation loss of a run, inf if it diverged, None if it is not finished."""


@dataclass(frozen=True)
class Tried:
    """The values of a key that a row has tried, with its other keys as chosen so far."""

    key: str
    place: int
    """Its place in `axes`."""
    losses: Mapping[float, float]
    """Validation losses of the finished runs, by value."""

    @property
    def best(self) -> float:
        """The value of the lowest loss; of equal losses, the lowest value."""
        return min(sorted(self.losses), key=self.losses.__getitem__)

    @property
    def is_at_edge(self) -> bool:
        """Whether the best value is a learning rate, and the lowest or the highest one tried."""
        return is_rate(self.key) and self.best in (min(self.losses), max(self.losses))


@dataclass(frozen=True)
class Tuning:
    """The state of the selection."""

    runs: tuple[Run, ...]
    """All selection runs that are known, without repetitions."""
    due: tuple[Run, ...]
    """The unfinished runs of the current key."""
    tried: Mapping[str, tuple[Tried, ...]]
    """The keys so far of each row that tunes some, in order; the last one may be incomplete."""
    chosen: Mapping[str, Mapping[str, float]]
    """The chosen values by row and key; empty until nothing is due."""
    num_later: int
    """Number of further selection runs."""


def tune(comparison: ComparisonConfig, find_loss: FindLoss) -> Tuning:
    """Follows the selection as far as the finished runs reach.

    Each of the axes in turn is tried with the other keys at their best values so far, or at their
    starting values.
    """
    choosing = [row for row in comparison.rows if row.values]
    best = {row.name: dict(row.start_values) for row in choosing}
    tried: dict[str, tuple[Tried, ...]] = {row.name: () for row in choosing}
    known: dict[Run, None] = {}
    for place, key in enumerate(comparison.axes):
        rows = [row for row in choosing if key in row.values]
        runs = {row.name: _runs_of_axis(comparison, row, key, best[row.name]) for row in rows}
        in_turn = _alternating([list(of_row.values()) for of_row in runs.values()])
        known |= dict.fromkeys(in_turn)
        for row in rows:
            losses = {value: find_loss(run) for value, run in runs[row.name].items()}
            finished = {value: loss for value, loss in losses.items() if loss is not None}
            tried[row.name] += (Tried(key, place, finished),)
        due = tuple(run for run in in_turn if find_loss(run) is None)
        if due:
            later = _num_later(choosing, comparison.axes[place + 1 :])
            return Tuning(tuple(known), due, tried, {}, later)
        for row in rows:
            best[row.name][key] = tried[row.name][-1].best
    return Tuning(tuple(known), (), tried, best, 0)


def _runs_of_axis(
    comparison: ComparisonConfig, row: RowConfig, key: str, best: Mapping[str, float]
) -> dict[float, Run]:
    """Returns a row's runs by value, middle values first, for early results of all rows."""
    values = row.values[key]
    middle = (len(values) - 1) / 2
    from_the_middle = sorted(values, key=lambda value: abs(values.index(value) - middle))
    return {
        value: plan_run(comparison, row, {**best, key: value}, comparison.selection_seed)
        for value in from_the_middle
    }


def _alternating(of_rows: Sequence[Sequence[Run]]) -> list[Run]:
    """Returns the first run of each row, then the second ones, and so on."""
    return [run for place in zip(*of_rows, strict=True) for run in place]


def _num_later(rows: Sequence[RowConfig], axes: Sequence[str]) -> int:
    """Returns the number of runs of later axes: all values but the one that is then the best."""
    return sum(len(row.values[key]) - 1 for key in axes for row in rows if key in row.values)
