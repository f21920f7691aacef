"""What a comparison trains next: runs that choose values, one key after the other, then the report.

It follows from the results so far, so that a stopped comparison continues where it was.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from switchtitan.data.prepare import open_corpus
from switchtitan.errors import ConfigError
from switchtitan.workbench.comparison.config import ComparisonConfig
from switchtitan.workbench.comparison.runs import (
    Run,
    RunResult,
    config_sha256,
    plan_run,
    read_csv,
    read_folder,
    resumed_from,
)

FindResult = Callable[[Run], RunResult | None]
"""Returns the result of a run, None if it is not finished."""
Values = Mapping[str, Mapping[str, float]]
"""Row -> tuned key -> value."""
RUNS_FILE = "runs.csv"


@dataclass(frozen=True)
class State:
    """The finished runs of a comparison, and what follows from them."""

    config: ComparisonConfig
    tried: list[tuple[str, dict[str, dict[float, float]]]]
    """The axes so far: the key, and row -> value -> validation loss of the finished run, inf if it
    diverged."""
    chosen: Values
    """Values by row, given ones included; empty while values are being chosen."""
    finished: Mapping[Run, RunResult]
    due: list[Run]
    """The unfinished runs of the current axis, or of the report, or those that they resume from;
    empty at the end."""

    def reported(self, row: str) -> dict[Run, RunResult]:
        """Returns the finished runs of a row with the seeds that are reported."""
        return {
            run: result
            for run, result in self.finished.items()
            if run.row == row and run.seed != self.config.selection_seed
        }


def follow(config: ComparisonConfig, find: FindResult) -> State:
    """Follows a comparison as far as its finished runs reach. Each of the axes in turn is tried
    with the other keys at their best values so far, at first their starting values."""
    best = {row.name: row.start_values for row in config.rows if row.values}
    tried: list[tuple[str, dict[str, dict[float, float]]]] = []
    finished: dict[Run, RunResult] = {}
    for key in config.axes:
        runs = _runs_of_axis(config, key, best)
        losses: dict[str, dict[float, float]] = {}
        for run in runs:
            if (result := find(run)) is not None:
                finished[run] = result
                loss = math.inf if result.diverged else result.validation_loss
                losses.setdefault(run.row, {})[run.tuned[key]] = loss
        tried.append((key, losses))
        if due := _due(runs, finished):
            return State(config, tried, {}, finished, due)
        for row, by_value in losses.items():
            best[row][key] = best_value(by_value)
    runs = _runs_of_report(config, best)
    finished |= {run: result for run in runs if (result := find(run)) is not None}
    chosen = {run.row: run.tuned for run in runs}
    return State(config, tried, chosen, finished, _due(runs, finished))


def _due(runs: list[Run], finished: Mapping[Run, RunResult]) -> list[Run]:
    """Returns the unfinished runs that can start; of the others, those that they resume from."""
    unfinished = [run for run in runs if run not in finished]
    if able := [run for run in unfinished if run.can_start]:
        return able
    return list(dict.fromkeys(run.source for run in unfinished if run.source is not None))


def best_value(losses: Mapping[float, float]) -> float:
    """Returns the value of the lowest loss; of equal losses, the lowest value."""
    return min(sorted(losses), key=losses.__getitem__)


def _runs_of_axis(config: ComparisonConfig, key: str, best: Values) -> list[Run]:
    """Returns a run for each value. Rows alternate, so that one that cannot train fails early."""
    rows = [row for row in config.rows if key in row.values]
    runs = [
        plan_run(config, row, {**best[row.name], key: value}, config.selection_seed)
        for values in zip(*(row.values[key] for row in rows), strict=True)
        for row, value in zip(rows, values, strict=True)
    ]
    return _sharing_steps(config, runs)


def _runs_of_report(config: ComparisonConfig, best: Values) -> list[Run]:
    runs = [
        plan_run(config, row, best.get(row.learning_rate_of or row.name, {}), seed)
        for seed in config.report_seeds
        for row in config.rows
    ]
    return _sharing_steps(config, runs)


def _sharing_steps(config: ComparisonConfig, runs: list[Run]) -> list[Run]:
    """Lets runs of rows with `resume_from` resume from those of that row with the same seed and
    values, if they are among the runs."""
    sources = {row.name: row.resume_from for row in config.rows}
    planned = {(run.row, run.seed, *run.tuned.items()): run for run in runs}
    found = [planned.get((sources[run.row], run.seed, *run.tuned.items())) for run in runs]
    return [
        run if source is None else resumed_from(source, run)
        for run, source in zip(runs, found, strict=True)
    ]


class Comparison:
    """A resumable comparison: it reads finished runs from CSV files, or from their folders. Raises
    a ConfigError if one of those files cannot be read.

    Args:
        folder: of its report, whose `runs.csv` is one of those files.
        corpus_fingerprint: the fingerprint of the corpus of all runs; None: not checked.
    """

    def __init__(
        self, config: ComparisonConfig, folder: Path, corpus_fingerprint: str | None = None
    ) -> None:
        self.config, self.folder = config, folder
        self._corpus_fingerprint = corpus_fingerprint
        own = folder / RUNS_FILE
        files = [*config.finished_runs, *([own] if own.exists() else [])]
        self._known = {key: result for file in files for key, result in read_csv(file).items()}

    def state(self) -> State:
        """Returns the current state."""
        return follow(self.config, self.result)

    def result(self, run: Run) -> RunResult | None:
        """Returns the result of a run, None if it is not finished. Raises a ConfigError if its
        folder has another configuration, or it is of another corpus."""
        key = config_sha256(run.config)
        result = self._known.get(key) or read_folder(run)
        if result is None and run.source is not None and not run.can_start:
            shared = self.result(run.source)
            if shared is not None and shared.diverged:  # before this run's own steps
                result = shared.model_copy(update={"row": run.row, "config_sha256": key})
        if result is None:
            return None
        self._known[key] = result
        found, expected = result.corpus_fingerprint, self._corpus_fingerprint
        if expected not in (None, found):
            raise ConfigError(
                f"{run.folder} was trained on a corpus with the fingerprint {found}, and this "
                f"machine's has {expected}; use the same corpus, or another output_dir without "
                "finished_runs"
            )
        return result


def check_plan(config: ComparisonConfig) -> None:
    """Raises a ConfigError if a row cannot be trained, with all its values, or not reported."""
    for run in _first_runs(config):
        training, evaluation = run.config.training, run.config.evaluation
        problem = None
        if training.dtype == "auto":
            problem = '[training] dtype = "auto": results would depend on the machine; choose one'
        elif evaluation.test_tokens is None:
            problem = "[evaluation] test_tokens is not set: the report needs a test split; set it"
        elif evaluation.interval > training.steps:
            problem = (
                f"[evaluation] interval = {evaluation.interval}: expected at most [training] steps "
                f"= {training.steps}: the final validation loss chooses the values"
            )
        if problem is not None:
            raise ConfigError(f"row {run.row}: {problem}")


def prepare_corpus(config: ComparisonConfig) -> str:
    """Prepares the corpus of all runs if it is missing; returns its fingerprint."""
    return open_corpus(_first_runs(config)[0].config.data).fingerprint


def _first_runs(config: ComparisonConfig) -> list[Run]:
    """Returns a run of each row, and of each declared value with starting values of other keys."""
    start = {row.name: row.start_values for row in config.rows if row.values}
    axis_runs = [run for key in config.axes for run in _runs_of_axis(config, key, start)]
    return axis_runs + _runs_of_report(config, start)
