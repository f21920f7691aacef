"""The file that declares a comparison: its rows, the values to choose from, and the seeds."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from switchtitan.comparison.selection import is_rate
from switchtitan.config.load import load_table
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.config.toml_files import read_toml
from switchtitan.errors import ConfigError

LEARNING_RATE = "optimizer.lr"
TUNED_SECTIONS = ("method", "optimizer")
"""The sections in which rows differ and that have the tuned keys."""


class RowConfig(Section):
    """A row of the table: a method and an optimizer with their keys."""

    name: str
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

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "expected letters, digits, '.', '_' and '-', with a letter or digit first"
            )
        return name

    @model_validator(mode="after")
    def _check_values(self) -> "RowConfig":
        if self.learning_rates and LEARNING_RATE in self.tune:
            raise ValueError(f"give either learning_rates or tune.{LEARNING_RATE!r}, not both")
        self._check_source_of_rate()
        for key, values in self.values.items():
            given = "learning_rates" if self.learning_rates and key == LEARNING_RATE else key
            _check_increasing(f"{given} = {list(values)}", key, values)
        for key, value in self.start.items():
            tried = self.values.get(key)
            if tried is None:
                raise ValueError(f"start: the row does not tune {key!r}; remove it")
            if value not in tried:
                raise ValueError(f"start: {key} = {value:g}: expected one of {list(tried)}")
        return self

    def _check_source_of_rate(self) -> None:
        gives_rate = LEARNING_RATE in self.given_values
        if self.learning_rate_of is None and not self.values and not gives_rate:
            raise ValueError(
                f"row {self.name} has no learning rate; give learning_rates (or `tune`), "
                "learning_rate_of, or `set.optimizer = { lr = ... }` if nothing is to be chosen"
            )
        if self.learning_rate_of is not None and (self.values or gives_rate):
            other = "set.optimizer.lr" if gives_rate else ", ".join(self.values)
            raise ValueError(
                f"row {self.name}: give either learning_rate_of = {self.learning_rate_of!r} or "
                f"{other}, not both"
            )
        if LEARNING_RATE in self.values and gives_rate:
            raise ValueError(
                f"row {self.name}: set.{LEARNING_RATE} has no effect: the row chooses it; remove it"
            )


def _check_increasing(place: str, key: str, values: Sequence[float]) -> None:
    is_increasing = all(low < high for low, high in pairwise(values))
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{place}: expected finite numbers")
    if is_rate(key) and (len(values) < 3 or values[0] <= 0 or not is_increasing):
        raise ValueError(
            f"{place}: expected at least three, above 0 and increasing, "
            "so that the best one can be between two others"
        )
    if len(values) < 2 or not is_increasing:
        raise ValueError(f"{place}: expected at least two, increasing")


class GapConfig(Section):
    """The share of the difference between two rows' losses that other rows close."""

    from_row: str
    """The row whose loss counts as 0 %."""
    to_row: str
    """The row whose loss counts as 100 %."""
    rows: tuple[str, ...] = Field(min_length=1)
    """The rows whose shares are reported."""


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
    """The row with which the losses and step times of the others are compared."""
    axes: tuple[str, ...] = Field(default=(LEARNING_RATE,), min_length=1)
    """The tuned keys, in the order in which they are chosen: each one with the other keys at their
    best values so far. A key can be repeated."""
    max_widenings: int = Field(default=2, ge=0)
    """Maximum number of times that every row gets one more value of a learning rate, because the
    best one of some row is its lowest or highest one. For each of `axes`."""
    communication_ranks: int = Field(default=8, ge=2)
    """Number of ranks for which the bytes sent in a step are counted."""
    differ_in: tuple[Literal["model", "training"], ...] = ()
    """Further sections in which rows may differ, e.g. to compare them after the same time."""
    finished_runs: tuple[Path, ...] = ()
    """The `runs.csv` of earlier reports, relative to this file: a run whose configuration and seed
    one of them has is finished, also without its folder."""
    rows: tuple[RowConfig, ...]
    """The rows of the table."""
    gaps: tuple[GapConfig, ...] = ()
    """Differences of losses of which shares are reported."""

    @field_validator("report_seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("expected different seeds")
        return seeds

    @model_validator(mode="after")
    def _check_rows(self) -> "ComparisonConfig":
        if self.selection_seed in self.report_seeds:
            raise ValueError(
                f"selection_seed = {self.selection_seed} is among report_seeds: "
                "rates chosen on a seed fit that seed; report other seeds"
            )
        if len(self.rows) < 2:
            raise ValueError("rows: expected at least two [[rows]]")
        names = [row.name for row in self.rows]
        mistakes = [
            f"rows: two have the name {name!r}"
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        titles = [row.title for row in self.rows]
        mistakes += [
            f"rows: two have the label {title!r}; tables and plots need different ones"
            for title in sorted({t for t in titles if titles.count(t) > max(1, names.count(t))})
        ]
        choosing = [row.name for row in self.rows if row.values]
        mistakes += self._mistakes_in_axes()
        referred = [("baseline", self.baseline)]
        for row in self.rows:
            if row.learning_rate_of is not None:
                referred.append((f"rows.{row.name}.learning_rate_of", row.learning_rate_of))
        for gap in self.gaps:
            referred += [("gaps.from_row", gap.from_row), ("gaps.to_row", gap.to_row)]
            referred += [("gaps.rows", row) for row in gap.rows]
        for key, name in referred:
            known = choosing if key.endswith("learning_rate_of") else names
            if name in known:
                continue
            if name in names:
                mistakes.append(
                    f"{key} = {name!r}: that row chooses no values itself; repeat its values in "
                    "`set`, or name the row that chooses them"
                )
            else:
                mistakes.append(f"{key} = {name!r}: expected one of {', '.join(known or names)}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

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
            if row.values and self.axes[0] not in row.values:
                mistakes.append(
                    f"rows.{row.name}: expected values of {self.axes[0]} to choose from"
                )
        return mistakes

    def row(self, name: str) -> RowConfig:
        """Returns the row called `name`."""
        return next(row for row in self.rows if row.name == name)

    def tuned_row(self, row: RowConfig) -> RowConfig:
        """Returns the row whose chosen values a row uses."""
        return row if row.learning_rate_of is None else self.row(row.learning_rate_of)


def load_comparison(file: Path) -> ComparisonConfig:
    """Reads the file that declares a comparison.

    The paths of the result are relative to the working directory.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    file = find_config(file)
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; expected the TOML file that declares a comparison"
        )
    if "rows" not in read_toml(file):
        raise ConfigError(
            f"{file}: declares no comparison, because it has no [[rows]]; "
            "expected a file like those in train_configs/comparisons/"
        )
    declared = load_table(file, ComparisonConfig)
    update = {
        "config": file.parent / declared.config,
        "finished_runs": tuple(file.parent / runs for runs in declared.finished_runs),
    }
    return declared.model_copy(update=update)
