"""The file that declares a comparison: its rows, their learning rates, and the seeds."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from switchtitan.config.load import load_table
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.config.toml_files import read_toml
from switchtitan.errors import ConfigError


class RowConfig(Section):
    """A row of the table: a method with its keys."""

    name: str
    """Name of the row, also in file names: letters, digits, `.`, `_` and `-`."""
    label: str | None = None
    """Name in tables and plots. Default: `name`."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates to choose from, increasing. At least three, and the same number as in
    every other row."""
    learning_rate_of: str | None = None
    """Use the rate chosen for this row instead, e.g. for an ablation that changes one of its
    keys."""
    set: dict[str, dict[str, Any]]
    """Keys that differ from `config`, by section."""

    @property
    def title(self) -> str:
        return self.label or self.name

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "expected letters, digits, '.', '_' and '-', with a letter or digit first"
            )
        return name

    @model_validator(mode="after")
    def _check_rates(self) -> "RowConfig":
        if (self.learning_rate_of is None) != bool(self.learning_rates):
            raise ValueError("give either learning_rates or learning_rate_of")
        rates = self.learning_rates
        if rates and (
            len(rates) < 3 or rates[0] <= 0 or any(high <= low for low, high in pairwise(rates))
        ):
            raise ValueError(
                f"learning_rates = {list(rates)}: expected at least three, above 0 and increasing, "
                "so that the best one can be between two others"
            )
        return self


class GapConfig(Section):
    """The share of the difference between two rows' losses that other rows close."""

    from_row: str
    """The row whose loss counts as 0 %."""
    to_row: str
    """The row whose loss counts as 100 %."""
    rows: tuple[str, ...] = Field(min_length=1)
    """The rows whose shares are reported."""


class ComparisonConfig(Section):
    """A comparison whose rows train and evaluate on the same tokens in the same order."""

    name: str = Field(min_length=1)
    """The title of the report."""
    config: Path
    """The training configuration of all rows, with a test split. Relative to this file."""
    output_dir: Path
    """Folder for runs and reports, relative to the working directory."""
    selection_seed: int = Field(ge=0)
    """Seed of the runs that choose each row's learning rate by validation loss."""
    report_seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the runs whose loss on the test split is reported; without `selection_seed`."""
    baseline: str
    """The row with which the losses and step times of the others are compared."""
    max_widenings: int = Field(default=2, ge=0)
    """Maximum number of times that every row gets one more rate, because the best rate of some row
    is its lowest or highest one."""
    communication_ranks: int = Field(default=8, ge=2)
    """Number of ranks for which the bytes sent in a step are counted."""
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
        choosing = {row.name: row.learning_rates for row in self.rows if row.learning_rates}
        if len({len(rates) for rates in choosing.values()}) > 1:
            counts = ", ".join(f"{name} has {len(rates)}" for name, rates in choosing.items())
            mistakes.append(
                f"every row must have the same number of learning_rates, for fairness: {counts}"
            )
        referred = [("baseline", self.baseline)]
        for row in self.rows:
            if row.learning_rate_of is not None:
                referred.append((f"rows.{row.name}.learning_rate_of", row.learning_rate_of))
        for gap in self.gaps:
            referred += [("gaps.from_row", gap.from_row), ("gaps.to_row", gap.to_row)]
            referred += [("gaps.rows", row) for row in gap.rows]
        for key, name in referred:
            known = choosing if key.endswith("learning_rate_of") else names
            if name not in known:
                mistakes.append(f"{key} = {name!r}: expected one of {', '.join(known)}")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def row(self, name: str) -> RowConfig:
        """Returns the row called `name`."""
        return next(row for row in self.rows if row.name == name)


def load_comparison(file: Path) -> ComparisonConfig:
    """Reads the file that declares a comparison.

    The result's `config` is relative to the working directory.

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
    return declared.model_copy(update={"config": file.parent / declared.config})
