"""The finished comparisons behind docs/RESULTS.md: their declarations and their CSV files."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from switchtitan.comparison.config import LEARNING_RATE, ComparisonConfig, load_comparison
from switchtitan.comparison.plan import first_run
from switchtitan.comparison.runs_csv import read_finished_runs
from switchtitan.comparison.selection import is_rate
from switchtitan.comparison.statistics import (
    BySeed,
    Difference,
    Share,
    adjusted,
    difference,
    mean_over_seeds,
    share_of_gap,
    verdict,
)
from switchtitan.job.config import JobConfig
from switchtitan.models.llama.config import LlamaFamilyConfig

_MIN_SEEDS = 3
"""The fewest seeds of which an interval says something."""
DECLARATIONS = Path(__file__).parents[1] / "train_configs" / "comparisons"

_Number = Annotated[float | None, BeforeValidator(lambda value: None if value == "" else value)]


class FinishedRun(BaseModel):
    """A line of a comparison's `runs.csv`, of this version or of one with fewer columns."""

    model_config = ConfigDict(extra="allow")

    stage: str
    row: str
    seed: int = Field(ge=0)
    diverged: bool
    validation_loss: _Number
    test_loss: _Number
    validation_bits_per_byte: _Number = None
    test_bits_per_byte: _Number = None
    state_gib: _Number = None
    num_trainable: _Number = None
    effective_rank: _Number = None

    @property
    def values(self) -> dict[str, float]:
        """The values of the tuned keys that the row has, by dotted key."""
        columns: dict[str, Any] = self.model_extra or {}
        # Before several keys could be tuned, the rate's column was called `learning_rate`.
        named = {LEARNING_RATE if key == "learning_rate" else key: columns[key] for key in columns}
        return {key: float(text) for key, text in named.items() if "." in key and text != ""}

    def loss(self, split: str) -> float:
        """Returns the loss on `validation` or `test`; inf if the run diverged.

        Raises:
            ValueError: if the run did not diverge and has no loss.
        """
        if self.diverged:
            return math.inf
        loss: float | None = getattr(self, f"{split}_loss")
        if loss is None:
            raise ValueError(f"row {self.row}, seed {self.seed}: no {split}_loss")
        return loss


@dataclass(frozen=True)
class Versus:
    """A row minus another one."""

    difference: Difference
    adjusted_p: float | None
    """p-value with Holm's correction over all rows that are compared with the same one."""

    @property
    def mean(self) -> float:
        return self.difference.mean

    @property
    def differs(self) -> bool:
        """Whether the rows are called different, after Holm's correction."""
        return verdict(self.difference, self.adjusted_p) == "differs"

    @property
    def holds_zero(self) -> bool:
        return self.difference.holds_zero


@dataclass(frozen=True)
class Change:
    """How a row's distance to the baseline changes from one comparison to another."""

    title: str
    before: Difference
    after: Difference
    change: Versus
    """`after` minus `before`, seed by seed."""


class Comparison:
    """The finished runs of a declared comparison.

    Args:
        name: of the files that declare it and have its runs.
        runs: of its CSV file, and of those of other comparisons that share rows with it.
        seeds: the seeds that are reported.
    """

    def __init__(
        self,
        name: str,
        declared: ComparisonConfig,
        runs: Sequence[FinishedRun],
        seeds: Sequence[int],
    ) -> None:
        self.name = name
        self.declared = declared
        self.seeds = tuple(seeds)
        self._runs = runs
        self._titles = {row.name: row.title for row in declared.rows}

    @property
    def missing_seeds(self) -> list[int]:
        """The declared seeds that are not reported, because some row has no run of them."""
        return [seed for seed in self.declared.report_seeds if seed not in self.seeds]

    @property
    def rows(self) -> list[str]:
        """The rows that have a run for every seed, in declared order."""
        names = [row.name for row in self.declared.rows]
        return [name for name in names if len(self.losses(name)) == len(self.seeds)]

    @property
    def baseline(self) -> str:
        return self.declared.baseline

    @property
    def num_tokens(self) -> int:
        """Training tokens of a run of the baseline."""
        return self.num_tokens_of(self.baseline)

    def num_tokens_of(self, row: str) -> int:
        """Returns the training tokens of a run of a row."""
        config = self.config(row)
        return config.training.steps * config.training.global_batch_size * config.data.seq_len

    def title(self, row: str) -> str:
        """Returns a row's name in tables."""
        return self._titles[row]

    def config(self, row: str) -> JobConfig:
        """Returns the configuration of a row, at its lowest declared values of tuned keys."""
        return first_run(self.declared, self.declared.row(row)).config()

    def num_in_blocks(self, row: str) -> int:
        """Returns the parameters of a row's linear layers in blocks, as without a method."""
        model = self.config(row).model
        if not isinstance(model, LlamaFamilyConfig):
            raise ValueError(f"{self.name}.csv: row {row}: {model.name} has no known linear layers")
        hidden_size, intermediate_size, num_layers, _ = model.sizes
        attention = 2 * hidden_size * (model.q_size + model.kv_size)
        return num_layers * (attention + 3 * hidden_size * intermediate_size)

    def losses(self, row: str, split: str = "test") -> BySeed:
        """Returns the reported losses of a row, by seed."""
        return {run.seed: run.loss(split) for run in self._reported(row)}

    def sizes(self, row: str, ends: Iterable[str]) -> dict[float, BySeed]:
        """Returns test losses of a method at several sizes, by parameters in blocks and seed.

        Args:
            row: start of the rows' names.
            ends: their ends, one for each size.
        """
        names = [f"{row}-{end}" for end in ends]
        return {self.num_in_blocks(name): self.losses(name) for name in names}

    def size_distances(self, row: str, other: str, ends: Iterable[str]) -> dict[float, BySeed]:
        """Returns the losses of a method minus another's at several sizes, as `sizes` does."""
        losses, others = self.sizes(row, ends), self.sizes(other, ends)
        return {
            size: {seed: loss - others[size][seed] for seed, loss in of_size.items()}
            for size, of_size in losses.items()
        }

    def change_of_distance(self, row: str, other: str, start: str, end: str) -> Difference:
        """Returns how much a method's distance to another changes between two settings.

        Args:
            row, other: starts of the rows' names, as in `sizes`.
            start, end: ends of the names of the two settings.
        """
        (before,), (after,) = (
            self.size_distances(row, other, [setting]).values() for setting in (start, end)
        )
        return mean_over_seeds({seed: after[seed] - before[seed] for seed in before})

    def values(self, row: str, column: str) -> list[float]:
        """Returns a column of a row's runs; empty in older files, which do not have it."""
        values = [getattr(run, column) for run in self._reported(row)]
        return [value for value in values if value is not None]

    def distinct(self, column: str) -> str:
        """Returns the different values of a column that says where the runs come from."""
        return " and ".join(sorted({str((run.model_extra or {})[column]) for run in self._runs}))

    def chosen(self, row: str) -> dict[str, float]:
        """Returns the values of the tuned keys with which a row's runs are reported.

        Raises:
            ValueError: if the runs have different ones.
        """
        first, *others = [run.values for run in self._reported(row)]
        if any(values != first for values in others):
            raise ValueError(f"row {row} is reported with different values: {first}, {others}")
        return first

    def is_at_edge(self, row: str, key: str) -> bool:
        """Whether the chosen value of a learning rate is the lowest or the highest one tried."""
        if not is_rate(key):
            return False
        runs = (run for run in self._runs if run.stage == "selection" and run.row == row)
        tried = {run.values[key] for run in runs if key in run.values}
        return len(tried) > 1 and self.chosen(row)[key] in (min(tried), max(tried))

    def versus(
        self, row: str, other: str, split: str = "test", family: Sequence[str] = ()
    ) -> Versus:
        """Returns the difference of two rows.

        Args:
            family: the rows over which p-values are adjusted. Default: all finished rows but
                `other`.
        """
        names = [name for name in (family or self.rows) if name != other]
        against = self.losses(other, split)
        differences = {
            name: of for name in names if (of := difference(self.losses(name, split), against))
        }
        return adjusted_for(differences)[row]

    def minus(self, row: str, other: str, split: str = "test") -> Difference:
        """Returns a row minus another one, seed by seed, without a correction."""
        return between(self, row, self, other, split)

    def pairs(self, pairs: Sequence[tuple[str, str]], split: str = "test") -> list[Versus]:
        """Returns the differences of pairs (row, other), with p-values adjusted over the pairs."""
        differences = {
            f"{row} minus {other}": self.minus(row, other, split) for row, other in pairs
        }
        return list(adjusted_for(differences).values())

    def share(self, row: str, start: str, end: str, split: str = "test") -> Share | None:
        """Returns the share of the difference from `start` to `end` that a row closes.

        None unless the interval of that difference is above zero.
        """
        if self.versus(start, end, split).mean <= 0:
            return None
        return share_of_gap(*(self.losses(name, split) for name in (row, start, end)))

    def distances(self, row: str, split: str = "test") -> BySeed:
        """Returns a row's losses minus the baseline's, by seed."""
        losses, baseline = self.losses(row, split), self.losses(self.baseline, split)
        return {seed: losses[seed] - baseline[seed] for seed in losses if seed in baseline}

    def _reported(self, row: str) -> list[FinishedRun]:
        return [
            run
            for run in self._runs
            if run.stage == "report" and run.row == row and run.seed in self.seeds
        ]


def read_comparison(folder: Path, name: str, *others: str) -> Comparison:
    """Reads a declared comparison, and others whose runs and seeds count as its own.

    Args:
        folder: has the CSV files.

    Raises:
        ValueError: if there are too few seeds of which every row has a run.
        ConfigError, ValueError: if a line of a file is not a finished run.
        ValueError: if two lines have other results of the same run.
    """
    declared = [load_comparison(DECLARATIONS / f"{each}.toml") for each in (name, *others)]
    files = [folder / f"{each}.csv" for each in (name, *others)]
    runs: dict[tuple[object, ...], FinishedRun] = {}
    for run in (run for file in files if file.exists() for run in _read_runs(file)):
        key = (run.stage, run.row, run.seed, *sorted(run.values.items()))
        if runs.setdefault(key, run) != run:
            raise ValueError(f"{', '.join(map(str, files))}: two lines of {key}; keep one")
    if others:
        seeds = {seed for each in declared for seed in each.report_seeds}
    else:
        seeds = _finished_seeds(declared[0], list(runs.values()))
        if len(seeds) < _MIN_SEEDS:
            raise ValueError(
                f"{files[0]}: every row has a run of {len(seeds)} seed(s), and intervals need "
                f"{_MIN_SEEDS}; finish `switchtitan compare "
                f"train_configs/comparisons/{name}.toml`, and copy `runs.csv` of its report there"
            )
    return Comparison(name, declared[0], list(runs.values()), sorted(seeds))


def _finished_seeds(declared: ComparisonConfig, runs: Sequence[FinishedRun]) -> set[int]:
    """Returns the declared seeds of which every row has a run."""
    finished = {(run.row, run.seed) for run in runs if run.stage == "report"}
    return {
        seed
        for seed in declared.report_seeds
        if all((row.name, seed) in finished for row in declared.rows)
    }


def _read_runs(file: Path) -> list[FinishedRun]:
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream, strict=True)
        lines = [(reader.line_num, line) for line in reader]
        columns = reader.fieldnames or []
    if "config_sha256" in columns:
        read_finished_runs(file)  # checks every line
    runs = []
    for number, line in lines:
        try:
            runs.append(FinishedRun.model_validate(line))
        except ValidationError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
    return runs


def between(
    first: Comparison, row: str, second: Comparison, other: str, split: str = "test"
) -> Difference:
    """Returns a row of one comparison minus one of another, over the seeds that both report.

    Raises:
        ValueError: if they share no seed.
    """
    return _difference(first.losses(row, split), second.losses(other, split))


def changes(before: Comparison, after: Comparison, split: str = "test") -> list[Change]:
    """Returns how each row's distance to the baseline changes between two comparisons.

    Both have the same rows, seeds, data order and initial weights, so distances are compared seed
    by seed, over the seeds that both report, and their changes are paired t-tests. p-values are
    adjusted over the rows.
    """
    rows = [row for row in before.rows if row in after.rows and row != before.baseline]
    shared = set(before.seeds) & set(after.seeds)
    pairs: Mapping[str, tuple[BySeed, BySeed]] = {
        row: (_of(before.distances(row, split), shared), _of(after.distances(row, split), shared))
        for row in rows
    }
    changed = adjusted_for(
        {row: _difference(second, first) for row, (first, second) in pairs.items()}
    )
    return [
        Change(
            title=before.title(row),
            before=mean_over_seeds(first),
            after=mean_over_seeds(second),
            change=changed[row],
        )
        for row, (first, second) in pairs.items()
    ]


def adjusted_for(differences: Mapping[str, Difference]) -> dict[str, Versus]:
    """Returns differences by name, with p-values adjusted over all of them."""
    adjusted_p = adjusted({name: of.p for name, of in differences.items()})
    return {name: Versus(of, adjusted_p.get(name)) for name, of in differences.items()}


def _of(values: BySeed, seeds: Set[int]) -> BySeed:
    return {seed: value for seed, value in values.items() if seed in seeds}


def _difference(row: BySeed, other: BySeed) -> Difference:
    found = difference(row, other)
    if found is None:
        raise ValueError("the two rows share no seed")
    return found
