"""The stages of a comparison: choose the rows' values, then train the reported runs."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, report_runs
from switchtitan.comparison.results import RunResult, config_sha256, read_result, result_of
from switchtitan.comparison.runs_csv import RunKey, read_finished_runs
from switchtitan.comparison.tuning import Tuning, tune
from switchtitan.errors import ConfigError

logger = logging.getLogger(__name__)

TrainAll = Callable[[list[Run]], None]
"""Trains runs; returns when all are finished."""


@dataclass(frozen=True)
class ComparisonState:
    """The finished runs of a comparison, and what follows from them."""

    config: ComparisonConfig
    tuning: Tuning
    selection: list[RunResult]
    """The finished runs that choose values."""
    report: list[RunResult] = field(default_factory=list)
    """The finished runs that are reported."""
    due: tuple[Run, ...] = ()
    """The unfinished runs of the current stage; empty if the comparison is complete."""

    @property
    def num_runs(self) -> int:
        """Number of known runs. A wider grid adds more."""
        num_reported = len(self.config.rows) * len(self.config.report_seeds)
        return len(self.tuning.runs) + self.tuning.num_later + num_reported


class Comparison:
    """A resumable comparison: it reads finished runs from their folders, or from CSV files.

    Args:
        corpus_fingerprint: the fingerprint of the corpus of all runs; None: not checked.

    Raises:
        ConfigError: if a CSV file of finished runs cannot be read.
    """

    def __init__(self, config: ComparisonConfig, corpus_fingerprint: str | None = None) -> None:
        self._config = config
        self._corpus_fingerprint = corpus_fingerprint
        self._in_file = read_finished_runs(*config.finished_runs)
        self._results: dict[Run, RunResult] = {}
        self._digests: dict[Run, str] = {}

    def state(self) -> ComparisonState:
        """Returns the current state."""
        tuning = tune(self._config, self._loss)
        selection = self._finished(tuning.runs)
        if tuning.due:
            return ComparisonState(self._config, tuning, selection, due=tuning.due)
        runs = report_runs(self._config, tuning.chosen)
        due = tuple(run for run in runs if not self.is_finished(run))
        return ComparisonState(self._config, tuning, selection, self._finished(runs), due)

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

    def _finished(self, runs: Iterable[Run]) -> list[RunResult]:
        return [result for run in runs if (result := self._result(run)) is not None]

    def _result(self, run: Run) -> RunResult | None:
        if run not in self._results:
            result = read_result(run) or self._result_in_file(run)
            if result is None:
                return None
            self._check_corpus(result)
            self._results[run] = result
        return self._results[run]

    def _result_in_file(self, run: Run) -> RunResult | None:
        if not self._in_file:
            return None
        if run not in self._digests:
            self._digests[run] = config_sha256(run.config())
        digest = self._digests[run]
        figures = self._in_file.get(RunKey(digest, run.seed))
        return None if figures is None else result_of(run, figures, digest, has_folder=False)

    def _check_corpus(self, result: RunResult) -> None:
        found, expected = result.figures["corpus"]["fingerprint"], self._corpus_fingerprint
        if expected not in (None, found):
            files = ", ".join(map(str, self._config.finished_runs))
            place = result.run.folder if result.has_folder else files
            raise ConfigError(
                f"{place}: {result.run.name} was trained on a corpus with the fingerprint {found}, "
                f"and this machine's has {expected}; use the same corpus, or another output_dir "
                "without finished_runs"
            )
