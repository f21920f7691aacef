"""The runs of a comparison and their configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from switchtitan.comparison.config import ComparisonConfig, RowConfig
from switchtitan.config.toml_text import toml_value
from switchtitan.data import open_corpus
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments

MIN_STEPS = 8
"""Steps needed for timing: three for warm-up, five timed."""
_KEYS_SET_BY_COMPARISON = ("optimizer.lr", "job.seed", "job.name", "job.output_dir")


@dataclass(frozen=True)
class Run:
    """A training run."""

    row: str
    learning_rate: float
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """The arguments of `switchtitan train`."""

    @property
    def name(self) -> str:
        return f"{self.row} lr {self.learning_rate:g} seed {self.seed}"

    def config(self) -> JobConfig:
        """Returns the configuration of the run.

        Raises:
            ConfigError: if the row's keys do not fit.
        """
        return self._parsed(self.arguments, 1)

    def config_on(self, num_ranks: int) -> JobConfig:
        """Returns the configuration for several ranks.

        Its micro-batch is the largest one that divides the batch, up to the run's own.

        Raises:
            ConfigError: if the batch is not a multiple of the number of ranks.
        """
        training = self.config().training
        fitting = [
            size
            for size in range(1, training.local_batch_size + 1)
            if training.global_batch_size % (num_ranks * size) == 0
        ]
        if not fitting:
            raise ConfigError(
                f"communication_ranks = {num_ranks}: [training] global_batch_size = "
                f"{training.global_batch_size} is not a multiple of it; change either"
            )
        return self._parsed(
            [*self.arguments, "--training.local_batch_size", str(fitting[-1])], num_ranks
        )

    def _parsed(self, arguments: Sequence[str], num_ranks: int) -> JobConfig:
        return parse_arguments(
            arguments, num_ranks, overrides_heading=f"in `set` of row {self.row}:"
        )


def plan_run(comparison: ComparisonConfig, row: RowConfig, learning_rate: float, seed: int) -> Run:
    """Returns the run of a row with a learning rate and a seed, in its own folder.

    Raises:
        ConfigError: if the row sets a key that the comparison sets.
    """
    folder = comparison.output_dir / "runs" / row.name / f"lr-{learning_rate:g}-seed-{seed}"
    keys: dict[str, object] = {
        f"{section}.{key}": value
        for section, keys in row.set.items()
        for key, value in keys.items()
    }
    for key in _KEYS_SET_BY_COMPARISON:
        if key in keys:
            raise ConfigError(
                f"row {row.name}: set.{key} has no effect: the comparison sets it; remove it"
            )
    keys |= {
        "optimizer.lr": learning_rate,
        "job.seed": seed,
        "job.name": f"{row.name}-lr-{learning_rate:g}-seed-{seed}",
        "job.output_dir": str(folder),
    }
    arguments = ["--config", str(comparison.config)]
    for key, value in keys.items():
        arguments += [f"--{key}", value if isinstance(value, str) else toml_value(value)]
    return Run(row.name, learning_rate, seed, folder, tuple(arguments))


def selection_runs(comparison: ComparisonConfig, rates: Mapping[str, Sequence[float]]) -> list[Run]:
    """Returns all runs that choose rates, middle rates first, for early results of all rows."""
    runs = []
    for place in range(max(map(len, rates.values()), default=0)):
        for name, of_row in rates.items():
            from_the_middle = sorted(
                of_row, key=lambda rate: abs(of_row.index(rate) - (len(of_row) - 1) / 2)
            )
            runs.append(
                plan_run(
                    comparison,
                    comparison.row(name),
                    from_the_middle[place],
                    comparison.selection_seed,
                )
            )
    return runs


def report_runs(comparison: ComparisonConfig, chosen: Mapping[str, float]) -> list[Run]:
    """Returns all runs that are reported, seed by seed.

    Args:
        chosen: the chosen rate of each row that chooses one.
    """
    return [
        plan_run(comparison, row, chosen[row.learning_rate_of or row.name], seed)
        for seed in comparison.report_seeds
        for row in comparison.rows
    ]


def check_plan(comparison: ComparisonConfig) -> None:
    """Checks before any run that all rows can be trained, reported and measured.

    Raises:
        ConfigError: if they cannot, or if rows differ in more than method and learning rate.
    """
    configs = {row.name: first_run(comparison, row).config() for row in comparison.rows}
    baseline = configs[comparison.baseline]
    for name, config in configs.items():
        differing = [
            section
            for section in type(baseline).model_fields
            if section not in ("job", "method") and not _is_same(section, config, baseline)
        ]
        if differing:
            raise ConfigError(
                f"row {name}: {', '.join(f'[{section}]' for section in differing)} differs from "
                f"{comparison.baseline}'s; rows may differ only in [method] and the learning rate; "
                f"set it for all rows in {comparison.config}"
            )
    _check_reportable(comparison, baseline)
    for row in comparison.rows:
        first_run(comparison, row).config_on(comparison.communication_ranks)


def check_corpus(comparison: ComparisonConfig) -> None:
    """Prepares the corpus if it is missing, and checks that it has all splits.

    Raises:
        CorpusError: if it has not.
    """
    config = first_run(comparison, comparison.row(comparison.baseline)).config()
    corpus = open_corpus(config.data)
    for split in ("train", "validation", "test"):
        for source in corpus.sources:
            source.split(split, config.data.seq_len)


def _check_reportable(comparison: ComparisonConfig, config: JobConfig) -> None:
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
            f"steps = {config.training.steps}: the final validation loss chooses the rates"
        )
    if not config.metrics.tensorboard:
        problems.append(
            "[metrics] tensorboard = false: loss curves are read from there; set it to true"
        )
    if config.training.steps < MIN_STEPS:
        problems.append(
            f"[training] steps = {config.training.steps}: expected at least {MIN_STEPS}"
        )
    if problems:
        raise ConfigError("\n".join(f"{comparison.config}: {problem}" for problem in problems))


def first_run(comparison: ComparisonConfig, row: RowConfig) -> Run:
    """Returns a row's run at its lowest declared rate, for uses that do not depend on the rate."""
    rate = (
        row.learning_rates[0]
        if row.learning_rates
        else comparison.row(row.learning_rate_of or "").learning_rates[0]
    )
    return plan_run(comparison, row, rate, comparison.selection_seed)


def _is_same(section: str, config: JobConfig, baseline: JobConfig) -> bool:
    ours, theirs = getattr(config, section), getattr(baseline, section)
    if section == "optimizer":
        return ours.model_dump(exclude={"lr"}) == theirs.model_dump(exclude={"lr"})
    return bool(ours == theirs)
