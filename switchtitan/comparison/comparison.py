"""The stages of a comparison: choose learning rates, widen the grid, train the reported runs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, report_runs, selection_runs
from switchtitan.comparison.results import RunResult, read_result
from switchtitan.comparison.selection import best_rate, is_interior, widened

logger = logging.getLogger(__name__)

TrainAll = Callable[[list[Run]], None]
"""Trains runs; returns when all are finished."""


@dataclass
class ComparisonState:
    """The finished runs of a comparison, and what follows from them."""

    config: ComparisonConfig
    rates: dict[str, list[float]] = field(default_factory=dict)
    """Learning rates of each row that chooses one, including those added so far."""
    selection: list[RunResult] = field(default_factory=list)
    report: list[RunResult] = field(default_factory=list)
    chosen: dict[str, float] = field(default_factory=dict)
    """The chosen rate of each such row, when all selection runs are finished."""
    num_runs: int = 0
    """Number of known runs. A wider grid adds more."""

    def losses(self, row: str) -> dict[float, float]:
        """Returns validation losses of a row's finished selection runs, by rate."""
        return {
            result.run.learning_rate: result.validation_loss
            for result in self.selection
            if result.run.row == row
        }


class Comparison:
    """A resumable comparison: it reads finished runs from their folders."""

    def __init__(self, config: ComparisonConfig) -> None:
        self._config = config
        self._results: dict[Run, RunResult] = {}

    def state(self) -> ComparisonState:
        """Returns the current state."""
        config = self._config
        choosing = [row for row in config.rows if row.learning_rates]
        state = ComparisonState(config, {row.name: list(row.learning_rates) for row in choosing})
        for widening in range(config.max_widenings + 1):
            runs = selection_runs(config, state.rates)
            state.selection = self._finished(runs)
            state.num_runs = len(runs) + len(config.rows) * len(config.report_seeds)
            if len(state.selection) < len(runs):
                return state
            losses = {name: state.losses(name) for name in state.rates}
            at_edge = [name for name in losses if not is_interior(losses[name])]
            if not at_edge or widening == config.max_widenings:
                break
            state.rates = {
                name: widened(rates, losses[name]) for name, rates in state.rates.items()
            }
        state.chosen = {name: best_rate(state.losses(name)) for name in state.rates}
        state.report = self._finished(report_runs(config, state.chosen))
        return state

    def due(self) -> list[Run]:
        """Returns the unfinished runs of the current stage; empty if the comparison is complete."""
        state = self.state()
        runs = (
            report_runs(self._config, state.chosen)
            if state.chosen
            else selection_runs(self._config, state.rates)
        )
        return [run for run in runs if not self.is_finished(run)]

    def is_finished(self, run: Run) -> bool:
        """Whether a run has a result."""
        return self._result(run) is not None

    def run(self, train_all: TrainAll) -> None:
        """Trains all remaining runs."""
        while runs := self.due():
            stage = "for the report" if self.state().chosen else "to choose learning rates"
            logger.info("training %d run(s) %s", len(runs), stage)
            train_all(runs)

    def _finished(self, runs: list[Run]) -> list[RunResult]:
        return [result for run in runs if (result := self._result(run)) is not None]

    def _result(self, run: Run) -> RunResult | None:
        if run not in self._results:
            result = read_result(run)
            if result is None:
                return None
            self._results[run] = result
        return self._results[run]
