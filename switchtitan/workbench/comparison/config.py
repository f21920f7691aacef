"""The file that declares a comparison: its rows, the values to choose from, and the seeds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from switchtitan.config import find_config, flatten, load_table
from switchtitan.registry import Section

LEARNING_RATE = "optimizer.lr"


class RowConfig(Section):
    """A row of the table: a method and an optimizer with their keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the row, also in file names: letters, digits, `.`, `_` and `-`."""
    label: str | None = None
    """Name in tables and plots. Default: `name`."""
    learning_rates: tuple[FiniteFloat, ...] = ()
    """Values of `optimizer.lr` to choose from; the same as `tune."optimizer.lr"`."""
    tune: dict[str, tuple[int | FiniteFloat, ...]] = Field(default_factory=dict)
    """Values to choose from, by a key of `axes`: at least three of a learning rate, at least two of
    other keys, and the same number as in every other row that tunes the key."""
    learning_rate_of: str | None = None
    """Use all values chosen for this row instead, e.g. for an ablation that changes one of its
    keys."""
    resume_from: str | None = None
    """Resume each run from the one of this row with the same seed and values, at the step where its
    own rate begins to fall ([lr_schedule] decay_ratio): lengths of a run share its stable part."""
    set: dict[Literal["method", "optimizer", "compile", "model", "training"], dict[str, Any]]
    """Keys that differ from `config`, by section; [model] and [training] only if `differ_in` has
    them. With `optimizer.lr`, the row chooses no values."""

    @property
    def values(self) -> dict[str, tuple[float, ...]]:
        """The values to choose from, increasing, by dotted key."""
        rates = {LEARNING_RATE: self.learning_rates} if self.learning_rates else {}
        return {key: tuple(sorted(set(of))) for key, of in {**rates, **self.tune}.items()}

    @property
    def start_values(self) -> dict[str, float]:
        """The value of each tuned key until it is its turn: the middle one, of two the lower."""
        return {key: values[(len(values) - 1) // 2] for key, values in self.values.items()}

    @property
    def given_values(self) -> dict[str, Any]:
        """The values of `set`, by dotted key."""
        sections: dict[Any, Any] = self.set
        return flatten(sections)

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
            if len(values) < (num_least := 3 if is_rate(key) else 2):
                raise ValueError(f"{key} = {list(values)}: expected at least {num_least} values")
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
    axes: tuple[Annotated[str, Field(pattern=r"^(method|optimizer)\.")], ...] = (LEARNING_RATE,)
    """The tuned keys of [method] and [optimizer], in the order in which they are chosen: each one
    with the other keys at their best values so far. A key can be repeated."""
    differ_in: tuple[Literal["model", "training"], ...] = ()
    """Further sections in which rows may differ, e.g. to compare them after the same time."""
    finished_runs: tuple[Path, ...] = ()
    """The `runs.csv` of earlier reports, relative to this file: a run whose configuration one of
    them has is finished, also without its folder."""
    rows: tuple[RowConfig, ...] = Field(min_length=2)
    """The rows of the table."""

    @model_validator(mode="after")
    def _check(self) -> "ComparisonConfig":
        if mistakes := list(self._mistakes()):
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        seeds = (self.selection_seed, *self.report_seeds)
        if len(set(seeds)) < len(seeds):
            yield (
                f"selection_seed and report_seeds = {', '.join(map(str, seeds))}: expected "
                "different seeds; values chosen on a seed fit that seed"
            )
        tuning = {row.name: row.values for row in self.rows if row.values}
        for key in self.axes:
            counts = {row: len(values[key]) for row, values in tuning.items() if key in values}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{row} has {count}" for row, count in counts.items())
                yield f"{key}: expected the same number of values in all rows: {listed}"
        names = [row.name for row in self.rows]
        if self.baseline not in names:
            yield f"baseline = {self.baseline!r}: expected one of {', '.join(names)}"
        for row in self.rows:
            if names.count(row.name) > 1:
                yield f"rows.{row.name}: another row has this name"
            if sections := {"model", "training"} & row.set.keys() - set(self.differ_in):
                listed = ", ".join(sorted(sections))
                yield f"rows.{row.name}.set.{listed}: add it to differ_in, or remove it"
            if row.learning_rate_of not in (None, *tuning):
                yield (
                    f"rows.{row.name}.learning_rate_of = {row.learning_rate_of!r}: expected a row "
                    f"that chooses values: {', '.join(tuning)}"
                )
            source = next((of for of in self.rows if of.name == row.resume_from), row)
            if row.resume_from is not None and (source is row or source.resume_from is not None):
                yield (
                    f"rows.{row.name}.resume_from = {row.resume_from!r}: expected another row "
                    "without resume_from"
                )
            tuned = tuning.get(row.learning_rate_of or row.name, {}).keys()
            if unknown := ", ".join(tuned - set(self.axes)):
                yield f"rows.{row.name}: tunes {unknown}, which axes does not have"
            if given := ", ".join(tuned & row.given_values.keys()):
                yield f"rows.{row.name}.set: {given} has no effect, because it is tuned"

    @property
    def num_runs(self) -> int:
        """Number of runs at most: each axis has a known run, the best so far; the first has not."""
        tuning = [row.values for row in self.rows if row.values]
        num_tried = sum(len(of[key]) - 1 for of in tuning for key in self.axes if key in of)
        return len(tuning) + num_tried + len(self.rows) * len(self.report_seeds)


def is_rate(key: str) -> bool:
    """Whether a dotted key is a learning rate, whose best value must be between two others."""
    return key.endswith((".lr", "_lr"))


def load_comparison(file: Path) -> ComparisonConfig:
    """Reads the file that declares a comparison; its paths become relative to the working
    directory. Raises a ConfigError with all mistakes in one message."""
    file = find_config(file)
    declared = load_table(file, ComparisonConfig)
    update = {
        "config": file.parent / declared.config,
        "finished_runs": tuple(file.parent / runs for runs in declared.finished_runs),
    }
    return declared.model_copy(update=update)
