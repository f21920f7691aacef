"""Chooses the values of each row's tuned keys, one key after the other.

A pure function of the losses so far: it says which runs are due, or which values are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, plan_run
from switchtitan.comparison.selection import Losses, best_value, is_interior, is_rate, widened

FindLoss = Callable[[Run], float | None]
"""Returns the validation loss of a run, inf if it diverged, None if it is not finished."""
Grids = dict[str, dict[str, list[float]]]
"""The values of each row, by name, and each of its keys."""


@dataclass(frozen=True)
class Tried:
    """The values of a key that a row has tried, with its other keys as chosen so far."""

    key: str
    place: int
    """Its place in `axes`."""
    losses: Losses
    """Validation losses of the finished runs, by value."""

    @property
    def best(self) -> float:
        """The value of the lowest loss."""
        return best_value(self.losses)

    @property
    def is_interior(self) -> bool | None:
        """Whether the best value is between two others; None if the key is no learning rate, or
        no run is finished."""
        return is_interior(self.losses) if self.losses and is_rate(self.key) else None


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
    """Number of further selection runs, if no grid is widened."""


def tune(comparison: ComparisonConfig, find_loss: FindLoss) -> Tuning:
    """Follows the selection as far as the finished runs reach.

    Each of the axes in turn is tried with the other keys at their best values so far, or at their
    starting values. While the best learning rate of any row is at the edge of its grid, every row
    gets one more value of it.
    """
    choosing = [row for row in comparison.rows if row.values]
    grids: Grids = {
        row.name: {key: list(values) for key, values in row.values.items()} for row in choosing
    }
    best = {row.name: dict(row.start_values) for row in choosing}
    tried: dict[str, tuple[Tried, ...]] = {row.name: () for row in choosing}
    known: dict[Run, None] = {}
    for place, key in enumerate(comparison.axes):
        rows = [row.name for row in choosing if key in row.values]
        for widening in range(comparison.max_widenings + 1):
            runs = _runs_of_axis(comparison, key, {name: grids[name][key] for name in rows}, best)
            known |= dict.fromkeys(runs.values())
            losses = {name: _losses(runs, name, find_loss) for name in rows}
            due = [run for run in runs.values() if find_loss(run) is None]
            if due or _is_settled(key, losses) or widening == comparison.max_widenings:
                break
            for name in rows:
                grids[name][key] = widened(grids[name][key], losses[name])
        for name in rows:
            tried[name] = (*tried[name], Tried(key, place, losses[name]))
        if due:
            later = _num_later(grids, comparison.axes[place + 1 :])
            return Tuning(tuple(known), tuple(due), tried, {}, later)
        for name in rows:
            best[name][key] = best_value(losses[name])
    return Tuning(tuple(known), (), tried, best, 0)


def _runs_of_axis(
    comparison: ComparisonConfig,
    key: str,
    grid: Mapping[str, Sequence[float]],
    best: Mapping[str, Mapping[str, float]],
) -> dict[tuple[str, float], Run]:
    """Returns the runs by row and value, middle values first, for early results of all rows."""
    runs = {}
    for place in range(max(map(len, grid.values()), default=0)):
        for name, values in grid.items():
            middle = (len(values) - 1) / 2
            from_the_middle = sorted(values, key=lambda value: abs(values.index(value) - middle))
            value = from_the_middle[place]
            runs[name, value] = plan_run(
                comparison,
                comparison.row(name),
                {**best[name], key: value},
                comparison.selection_seed,
            )
    return runs


def _losses(
    runs: Mapping[tuple[str, float], Run], row: str, find_loss: FindLoss
) -> dict[float, float]:
    return {
        value: loss
        for (name, value), run in runs.items()
        if name == row and (loss := find_loss(run)) is not None
    }


def _is_settled(key: str, losses: Mapping[str, Losses]) -> bool:
    return not is_rate(key) or all(is_interior(of_row) for of_row in losses.values())


def _num_later(grids: Grids, axes: Sequence[str]) -> int:
    """Returns the number of runs of later axes: all values but the one that is then the best."""
    return sum(len(grid[key]) - 1 for key in axes for grid in grids.values() if key in grid)
