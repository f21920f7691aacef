"""The stages of a comparison: choose the rows' values, then train the reported runs."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, report_runs
from switchtitan.comparison.runs import RunKey, RunResult, config_sha256, read_csv, read_folder
from switchtitan.comparison.tuning import Tuning, tune
from switchtitan.errors import ConfigError

logger = logging.getLogger(__name__)

TrainAll = Callable[[list[Run]], None]
"""Trains runs; returns when all are finished."""
RUNS_FILE = "runs.csv"


@dataclass(frozen=True)
class ComparisonState:
    """The finished runs of a comparison, and what follows from them."""

    config: ComparisonConfig
    tuning: Tuning
    selection: dict[Run, RunResult]
    """The finished runs that choose values."""
    report: dict[Run, RunResult] = field(default_factory=dict)
    """The finished runs that are reported."""
    due: tuple[Run, ...] = ()
    """The unfinished runs of the current stage; empty if the comparison is complete."""
    others: tuple[RunResult, ...] = ()
    """Further results in the report's file, e.g. of a stage that has begun again."""

    @property
    def num_finished(self) -> int:
        return len(self.selection) + len(self.report)

    @property
    def num_runs(self) -> int:
        """Number of runs of the whole comparison."""
        num_reported = len(self.config.rows) * len(self.config.report_seeds)
        return len(self.tuning.runs) + self.tuning.num_later + num_reported


class Comparison:
    """A resumable comparison: it reads finished runs from CSV files, or from their folders.

    Args:
        folder: of its report, whose `runs.csv` is one of those files.
        corpus_fingerprint: the fingerprint of the corpus of all runs; None: not checked.

    Raises:
        ConfigError: if a CSV file of finished runs cannot be read.
    """

    def __init__(
        self, config: ComparisonConfig, folder: Path, corpus_fingerprint: str | None = None
    ) -> None:
        self.config, self.folder = config, folder
        self._corpus_fingerprint = corpus_fingerprint
        own = folder / RUNS_FILE
        self._in_report = read_csv([own] if own.exists() else [])
        self._known = read_csv(config.finished_runs) | self._in_report
        self._keys: dict[Run, RunKey] = {}

    def state(self) -> ComparisonState:
        """Returns the current state."""
        tuning = tune(self.config, self._loss)
        selection = self._finished(tuning.runs)
        report: dict[Run, RunResult] = {}
        due = tuning.due
        if not due:
            runs = report_runs(self.config, tuning.chosen)
            report = self._finished(runs)
            due = tuple(run for run in runs if run not in report)
        used = {self._keys[run] for run in (*selection, *report)}
        others = tuple(result for key, result in self._in_report.items() if key not in used)
        return ComparisonState(self.config, tuning, selection, report, due, others)

    def is_finished(self, run: Run) -> bool:
        """Whether a run has a result."""
        return self._result(run) is not None

    def run(self, train_all: TrainAll) -> None:
        """Trains all remaining runs."""
        while (state := self.state()).due:
            stage = "to choose values" if state.tuning.due else "for the report"
            logger.info("training %d run(s) %s", len(state.due), stage)
            train_all(list(state.due))

    def _loss(self, run: Run) -> float | None:
        result = self._result(run)
        return None if result is None else result.validation_loss

    def _finished(self, runs: Iterable[Run]) -> dict[Run, RunResult]:
        return {run: result for run in runs if (result := self._result(run)) is not None}

    def _result(self, run: Run) -> RunResult | None:
        if run not in self._keys:
            self._keys[run] = (config_sha256(run.config()), run.seed)
        key = self._keys[run]
        if key not in self._known:
            result = read_folder(run)
            if result is None:
                return None
            self._known[key] = result
        self._check_corpus(run, self._known[key])
        return self._known[key]

    def _check_corpus(self, run: Run, result: RunResult) -> None:
        found, expected = result.corpus_fingerprint, self._corpus_fingerprint
        if expected not in (None, found):
            raise ConfigError(
                f"{run.name} was trained on a corpus with the fingerprint {found}, and this "
                f"machine's has {expected}; use the same corpus, or another output_dir without "
                "finished_runs"
            )
