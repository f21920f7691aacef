"""The file that declares a comparison: its rows, the values to choose from, and the seeds."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from switchtitan.config import find_config, load_table, read_toml
from switchtitan.errors import ConfigError
from switchtitan.registry import Section

LEARNING_RATE = "optimizer.lr"
TUNED_SECTIONS = ("method", "optimizer")
"""The sections in which rows differ and that have the tuned keys."""


class RowConfig(Section):
    """A row of the table: a method and an optimizer with their keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the row, also in file names: letters, digits, `.`, `_` and `-`."""
    label: str | None = None
    """Name in tables and plots. Default: `name`."""
    learning_rates: tuple[float, ...] = ()
    """Values of `optimizer.lr` to choose from; the same as `tune."optimizer.lr"`."""
    tune: dict[str, tuple[int | float, ...]] = Field(default_factory=dict)
    """Values to choose from, increasing, by a key of `axes`: at least three of a learning rate, at
    least two of other keys, and the same number as in every other row that tunes the key."""
    start: dict[str, int | float] = Field(default_factory=dict)
    """The value of a tuned key until it is its turn, one of those to choose from. Default: the
    middle one, of two the lower."""
    learning_rate_of: str | None = None
    """Use all values chosen for this row instead, e.g. for an ablation that changes one of its
    keys."""
    set: dict[str, dict[str, Any]]
    """Keys of [method], [optimizer] and [compile], and of sections in `differ_in`, that differ
    from `config`, by section. With `optimizer.lr`, the row chooses no values."""

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def values(self) -> dict[str, tuple[float, ...]]:
        """The values to choose from, by dotted key."""
        of_lr = {LEARNING_RATE: self.learning_rates} if self.learning_rates else {}
        return of_lr | {
            key: tuple(map(float, values)) if is_rate(key) else values
            for key, values in self.tune.items()
        }

    @property
    def given_values(self) -> dict[str, Any]:
        """The values of `set`, by dotted key."""
        return {
            f"{section}.{key}": value
            for section, keys in self.set.items()
            for key, value in keys.items()
        }

    @property
    def start_values(self) -> dict[str, float]:
        """The first value of each tuned key."""
        return {
            key: self.start.get(key, values[(len(values) - 1) // 2])
            for key, values in self.values.items()
        }

    @model_validator(mode="after")
    def _check_values(self) -> "RowConfig":
        sources = {
            "learning_rates": bool(self.learning_rates),
            f"tune.{LEARNING_RATE!r}": LEARNING_RATE in self.tune,
            f"set.{LEARNING_RATE}": LEARNING_RATE in self.given_values,
            "learning_rate_of": self.learning_rate_of is not None,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) != 1:
            raise ValueError(
                f"row {self.name}: {' and '.join(given) or 'no learning rate'}: expected exactly "
                f"one of {', '.join(sources)}"
            )
        for key, values in self.values.items():
            _check_increasing(key, values)
        for key, value in self.start.items():
            if value not in self.values.get(key, ()):
                raise ValueError(f"start: {key} = {value:g}: expected one of the row's values")
        return self


class ComparisonConfig(Section):
    """A comparison whose rows train and evaluate on the same tokens in the same order, unless they
    differ in [training]."""

    name: str = Field(min_length=1)
    """The title of the report."""
    config: Path
    """The training configuration of all rows, with a test split. Relative to this file."""
    output_dir: Path
    """Folder for runs and reports, relative to the working directory."""
    selection_seed: int = Field(ge=0)
    """Seed of the runs that choose each row's values by the validation loss after the last step."""
    report_seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the runs whose loss on the test split is reported; without `selection_seed`."""
    baseline: str
    """The row with which the losses of the others are compared."""
    axes: tuple[str, ...] = Field(default=(LEARNING_RATE,), min_length=1)
    """The tuned keys, in the order in which they are chosen: each one with the other keys at their
    best values so far. A key can be repeated."""
    differ_in: tuple[Literal["model", "training"], ...] = ()
    """Further sections in which rows may differ, e.g. to compare them after the same time."""
    finished_runs: tuple[Path, ...] = ()
    """The `runs.csv` of earlier reports, relative to this file: a run whose configuration and seed
    one of them has is finished, also without its folder."""
    rows: tuple[RowConfig, ...] = Field(min_length=2)
    """The rows of the table."""

    @field_validator("report_seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("expected different seeds")
        return seeds

    @model_validator(mode="after")
    def _check_rows(self) -> "ComparisonConfig":
        mistakes = [*self._mistakes_in_names(), *self._mistakes_in_axes()]
        if self.selection_seed in self.report_seeds:
            mistakes.append(
                f"selection_seed = {self.selection_seed} is among report_seeds: "
                "rates chosen on a seed fit that seed; report other seeds"
            )
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes_in_names(self) -> list[str]:
        names = [row.name for row in self.rows]
        mistakes = [
            f"rows: two have the name {name!r}"
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        if self.baseline not in names:
            mistakes.append(f"baseline = {self.baseline!r}: expected one of {', '.join(names)}")
        choosing = [row.name for row in self.rows if row.values]
        for row in self.rows:
            if row.learning_rate_of is not None and row.learning_rate_of not in choosing:
                mistakes.append(
                    f"rows.{row.name}.learning_rate_of = {row.learning_rate_of!r}: expected a row "
                    f"that chooses values: {', '.join(choosing)}"
                )
        return mistakes

    def _mistakes_in_axes(self) -> list[str]:
        mistakes = []
        for key in dict.fromkeys(self.axes):
            section, _, name = key.partition(".")
            if section not in TUNED_SECTIONS or not name:
                mistakes.append(f"axes: {key!r}: expected a key of [method] or [optimizer]")
            counts = {row.name: len(row.values[key]) for row in self.rows if key in row.values}
            if not counts and not any(key in row.given_values for row in self.rows):
                mistakes.append(f"axes: no row tunes {key!r}; remove it")
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{row} has {count}" for row, count in counts.items())
                mistakes.append(
                    f"every row that tunes {key} must have the same number of values, for "
                    f"fairness: {listed}"
                )
        for row in self.rows:
            if unknown := [key for key in row.values if key not in self.axes]:
                mistakes.append(
                    f"rows.{row.name}: tunes {', '.join(unknown)}, which axes does not have"
                )
        return mistakes

    def row(self, name: str) -> RowConfig:
        """Returns the row called `name`."""
        return next(row for row in self.rows if row.name == name)

    def tuned_row(self, row: RowConfig) -> RowConfig:
        """Returns the row whose chosen values a row uses."""
        return row if row.learning_rate_of is None else self.row(row.learning_rate_of)


def is_rate(key: str) -> bool:
    """Whether a dotted key is a learning rate, whose best value must be between two others."""
    name = key.rpartition(".")[2]
    return name == "lr" or name.endswith("_lr")


def load_comparison(file: Path) -> ComparisonConfig:
    """Reads the file that declares a comparison.

    The paths of the result are relative to the working directory.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    file = find_config(file)
    if not file.is_file() or "rows" not in read_toml(file):
        raise ConfigError(
            f"{file}: declares no comparison: expected a TOML file with [[rows]], like those in "
            "train_configs/comparisons/"
        )
    declared = load_table(file, ComparisonConfig)
    update = {
        "config": file.parent / declared.config,
        "finished_runs": tuple(file.parent / runs for runs in declared.finished_runs),
    }
    return declared.model_copy(update=update)


def _check_increasing(key: str, values: Sequence[float]) -> None:
    is_increasing = all(low < high for low, high in pairwise(values))
    num_least = 3 if is_rate(key) else 2
    if not (is_increasing and len(values) >= num_least and all(map(math.isfinite, values))):
        raise ValueError(
            f"{key} = {list(values)}: expected at least {num_least} finite numbers, increasing"
        )
