"""The file that declares a comparison: its rows, their learning rates, and the seeds."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from switchtitan.config.load import load_table, read_toml
from switchtitan.config.section import Section
from switchtitan.config.shipped import find_config
from switchtitan.errors import ConfigError


class RowConfig(Section):
    """One row of the table: a method with its keys."""

    name: str
    """Name of the row, also in file names: letters, digits, `.`, `_` and `-`."""
    label: str | None = None
    """Name in tables and plots; `name` unless set."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rates to choose from, increasing; at least three, and as many as every other row has."""
    learning_rate_of: str | None = None
    """Use the rate chosen for this row instead: for ablations, which change one of its keys."""
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
                f"learning_rates = {list(rates)}: expected at least three, above 0 and increasing, so that the best can lie "
                "between two others"
            )
        return self


class GapConfig(Section):
    """A question to the table: what share of the difference between two rows' losses do other rows close?"""

    from_row: str
    """The row whose loss counts as 0 %."""
    to_row: str
    """The row whose loss counts as 100 %."""
    rows: tuple[str, ...] = Field(min_length=1)
    """The rows whose share is reported."""


class ComparisonConfig(Section):
    """A comparison: all rows train on the same tokens in the same order and are evaluated on the same text."""

    name: str = Field(min_length=1)
    """The title of the report."""
    config: Path
    """The training configuration that all rows share, relative to this file; with a test split."""
    output_dir: Path
    """Folder for runs and reports, relative to the working directory."""
    selection_seed: int = Field(ge=0)
    """Seed of the runs that choose each row's learning rate by validation loss."""
    report_seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the runs whose loss on the test split is reported; not the selection's."""
    baseline: str
    """The row to which the others' losses and step times are compared."""
    max_widenings: int = Field(default=2, ge=0)
    """How many times every row may get one more rate because some row's best rate is its lowest or highest."""
    communication_ranks: int = Field(default=8, ge=2)
    """Number of ranks for which the communicated bytes of a step are counted."""
    rows: tuple[RowConfig, ...]
    """The table's rows."""
    gaps: tuple[GapConfig, ...] = ()
    """Shares of differences to report."""

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
                f"selection_seed = {self.selection_seed} is among report_seeds: rates chosen on a seed fit it, so report others"
            )
        if len(self.rows) < 2:
            raise ValueError("rows: expected at least two [[rows]]")
        names = [row.name for row in self.rows]
        mistakes = [
            f"rows: two are called {name!r}"
            for name in sorted({n for n in names if names.count(n) > 1})
        ]
        choosing = {row.name: row.learning_rates for row in self.rows if row.learning_rates}
        if len({len(rates) for rates in choosing.values()}) > 1:
            counts = ", ".join(f"{name} has {len(rates)}" for name, rates in choosing.items())
            mistakes.append(
                f"every row must choose among equally many learning_rates, for fairness: {counts}"
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
        """The row called `name`."""
        return next(row for row in self.rows if row.name == name)


def load_comparison(file: Path) -> ComparisonConfig:
    """Reads the declaration of a comparison; its `config` comes back relative to where the program runs.

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
            f"{file}: it declares no comparison, which takes [[rows]]; expected a file like those in "
            "train_configs/comparisons/"
        )
    declared = load_table(file, ComparisonConfig)
    return declared.model_copy(update={"config": file.parent / declared.config})
