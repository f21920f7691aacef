"""The runs of a comparison and their configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from switchtitan.comparison.config import TUNED_SECTIONS, ComparisonConfig, RowConfig
from switchtitan.config import toml_value
from switchtitan.data import open_corpus
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments

_KEYS_OF_JOB = ("job.seed", "job.name", "job.output_dir")
"""Keys that the comparison sets, in addition to the tuned ones."""


def short_name(key: str) -> str:
    """Returns the name of a tuned key in tables and folders: without `optimizer.`."""
    return key.removeprefix("optimizer.")


@dataclass(frozen=True)
class Run:
    """A training run."""

    row: str
    tuned: tuple[tuple[str, float], ...]
    """Values of the tuned keys, in the order of the axes; of a row that chooses none, those that it
    gives."""
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """The arguments of `switchtitan train`."""

    @property
    def name(self) -> str:
        values = [f"{short_name(key)} {value:g}" for key, value in self.tuned]
        return " ".join([self.row, *values, f"seed {self.seed}"])

    def value(self, key: str) -> float | None:
        """Returns the value of a tuned key; None if the row does not have it."""
        return dict(self.tuned).get(key)

    def config(self) -> JobConfig:
        """Returns the configuration of the run.

        Raises:
            ConfigError: if the row's keys do not fit.
        """
        try:
            return parse_arguments(self.arguments, 1)
        except ConfigError as error:
            raise ConfigError(f"row {self.row}: {error}") from error


def plan_run(
    comparison: ComparisonConfig, row: RowConfig, values: Mapping[str, float], seed: int
) -> Run:
    """Returns the run of a row with values of its tuned keys and a seed, in its own folder.

    Raises:
        ConfigError: if the row sets a key that the comparison sets.
    """
    keys = row.given_values
    for key in (*values, *_KEYS_OF_JOB):
        if key in keys:
            raise ConfigError(
                f"row {row.name}: set.{key} has no effect: the comparison sets it; remove it"
            )
    known = values or given_values(comparison, row)
    tuned = tuple((key, known[key]) for key in dict.fromkeys(comparison.axes) if key in known)
    parts = [f"{short_name(key)}-{value:g}" for key, value in tuned]
    label = "-".join([*parts, f"seed-{seed}"])
    folder = comparison.output_dir / "runs" / row.name / label
    keys |= dict(tuned) | {
        "job.seed": seed,
        "job.name": f"{row.name}-{label}",
        "job.output_dir": str(folder),
    }
    arguments = ["--config", str(comparison.config)]
    for key, value in keys.items():
        arguments += [f"--{key}", value if isinstance(value, str) else toml_value(value)]
    return Run(row.name, tuned, seed, folder, tuple(arguments))


def given_values(comparison: ComparisonConfig, row: RowConfig) -> dict[str, float]:
    """Returns the numbers that a row gives for keys of the axes, by dotted key."""
    given = row.given_values
    return {
        key: given[key]
        for key in comparison.axes
        if isinstance(given.get(key), int | float) and not isinstance(given[key], bool)
    }


def report_runs(
    comparison: ComparisonConfig, chosen: Mapping[str, Mapping[str, float]]
) -> list[Run]:
    """Returns all runs that are reported, with the chosen values of each row that has some."""
    return [
        plan_run(comparison, row, chosen.get(comparison.tuned_row(row).name, {}), seed)
        for seed in comparison.report_seeds
        for row in comparison.rows
    ]


def check_plan(comparison: ComparisonConfig) -> None:
    """Checks before any run that all rows can be trained and reported.

    Raises:
        ConfigError: if they cannot, or if rows differ in a section in which they may not.
    """
    configs = {row.name: first_run(comparison, row).config() for row in comparison.rows}
    baseline = configs[comparison.baseline]
    may_differ = ("job", "compile", *TUNED_SECTIONS, *comparison.differ_in)
    for name, config in configs.items():
        differing = [
            f"[{section}]"
            for section in type(baseline).model_fields
            if section not in may_differ and getattr(config, section) != getattr(baseline, section)
        ]
        if differing:
            raise ConfigError(
                f"row {name}: {', '.join(differing)} differs from {comparison.baseline}'s; rows "
                "may differ only in [method], [optimizer], [compile], and in [model] and "
                f"[training] if `differ_in` says so; set it for all rows in {comparison.config}"
            )
        _check_reportable(f"row {name}", config)
    for row in comparison.rows:
        for key, values in comparison.tuned_row(row).values.items():
            for value in values:
                first_run(comparison, row, {key: value}).config()


def check_corpus(comparison: ComparisonConfig) -> str:
    """Prepares the corpus if it is missing, and checks that it has all splits.

    Returns:
        its fingerprint.

    Raises:
        CorpusError: if it has not.
    """
    config = first_run(comparison, comparison.row(comparison.baseline)).config()
    corpus = open_corpus(config.data)
    for split in ("train", "validation", "test"):
        for source in corpus.sources:
            source.split(split, config.data.seq_len)
    return corpus.fingerprint


def first_run(
    comparison: ComparisonConfig, row: RowConfig, changes: Mapping[str, float] | None = None
) -> Run:
    """Returns a row's run at its lowest declared values, for uses that do not depend on them.

    Args:
        changes: values of tuned keys that it has instead.
    """
    lowest = {key: values[0] for key, values in comparison.tuned_row(row).values.items()}
    return plan_run(comparison, row, lowest | dict(changes or {}), comparison.selection_seed)


def _check_reportable(place: str, config: JobConfig) -> None:
    problems = []
    if config.training.dtype == "auto":
        problems.append(
            '[training] dtype = "auto": runs of a comparison may not depend on the machine; write '
            'dtype = "bfloat16" or "float32"'
        )
    if config.evaluation.test_tokens is None:
        problems.append(
            "[evaluation] test_tokens is not set; the report needs a test split, on which nothing "
            "was chosen: set it, and [data] test_fraction"
        )
    if config.evaluation.interval > config.training.steps:
        problems.append(
            f"[evaluation] interval = {config.evaluation.interval}: expected at most [training] "
            f"steps = {config.training.steps}: the final validation loss chooses the values"
        )
    if not config.metrics.tensorboard:
        problems.append(
            "[metrics] tensorboard = false: loss curves are read from there; set it to true"
        )
    if problems:
        raise ConfigError("\n".join(f"{place}: {problem}" for problem in problems))
