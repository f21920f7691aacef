"""Which runs a comparison consists of, and how each is configured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from switchtitan.comparison.config import ComparisonConfig, Row
from switchtitan.config import ConfigError
from switchtitan.config.toml_text import toml_value
from switchtitan.job_config import JobConfig, parse_arguments


@dataclass(frozen=True)
class Run:
    """One training run."""

    row: str
    learning_rate: float
    seed: int
    folder: Path
    arguments: tuple[str, ...]
    """The command line of the training program."""

    @property
    def name(self) -> str:
        return f"{self.row} lr {self.learning_rate:g} seed {self.seed}"

    def config(self, num_ranks: int = 1) -> JobConfig:
        """The configuration that it trains with; on several ranks the same with a micro-batch of one sequence.

        Raises:
            ConfigError: if the row's keys do not fit.
        """
        try:
            smaller = ("--training.local_batch_size", "1") if num_ranks > 1 else ()
            return parse_arguments([*self.arguments, *smaller], num_ranks)
        except ConfigError as error:
            raise ConfigError(f"row {self.row}: {error}") from error


def plan_run(comparison: ComparisonConfig, row: Row, learning_rate: float, seed: int) -> Run:
    """The run of a row at a rate and a seed; its folder is its own."""
    folder = comparison.output_dir / "runs" / row.name / f"lr-{learning_rate:g}-seed-{seed}"
    keys: dict[str, object] = {
        f"{section}.{key}": value for section, keys in row.set.items() for key, value in keys.items()
    }
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
    """All runs among which rates are chosen; the middle rates first, so that what is known early is known of all rows."""
    runs = []
    for place in range(max(map(len, rates.values()), default=0)):
        for name, of_row in rates.items():
            from_the_middle = sorted(of_row, key=lambda rate: abs(of_row.index(rate) - (len(of_row) - 1) / 2))
            runs.append(
                plan_run(comparison, comparison.row(name), from_the_middle[place], comparison.selection_seed)
            )
    return runs


def report_runs(comparison: ComparisonConfig, chosen: Mapping[str, float]) -> list[Run]:
    """All runs that are reported, seed by seed.

    Args:
        chosen: each choosing row's rate.
    """
    return [
        plan_run(comparison, row, chosen[row.learning_rate_of or row.name], seed)
        for seed in comparison.report_seeds
        for row in comparison.rows
    ]


def check_plan(comparison: ComparisonConfig) -> None:
    """Makes sure that every row's configuration is valid, and that rows differ in their methods alone.

    Raises:
        ConfigError: otherwise.
    """
    configs = {}
    for row in comparison.rows:
        rate = row.learning_rates[0] if row.learning_rates else 1e-3
        configs[row.name] = plan_run(comparison, row, rate, comparison.selection_seed).config()
    first = configs[comparison.baseline]
    for name, config in configs.items():
        for section in ("data", "evaluation"):
            if getattr(config, section) != getattr(first, section):
                raise ConfigError(
                    f"row {name}: [{section}] differs from {comparison.baseline}'s; all rows must see the same text"
                )
        tokens = (config.training.steps, config.training.global_batch_size)
        if tokens != (first.training.steps, first.training.global_batch_size):
            raise ConfigError(
                f"row {name}: [training] steps and global_batch_size = {tokens} differ from {comparison.baseline}'s; all rows "
                "must train on equally many tokens"
            )
        if config.evaluation.test_tokens is None:
            raise ConfigError(
                f"{comparison.config}: [evaluation] test_tokens is not set; the report needs a test split, on which nothing "
                "was chosen: set it, and [data] test_fraction"
            )
