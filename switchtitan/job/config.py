"""The configuration of a training run, and how it is read from the command line."""

from collections.abc import Sequence
from typing import Annotated

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.config.command_line import print_help, split_arguments
from switchtitan.config.load import load_config
from switchtitan.config.section import Section
from switchtitan.config.shipped import QUICKSTART, find_config
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DataConfig
from switchtitan.distributed.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
)
from switchtitan.distributed.world import device_type, num_ranks_from_launcher
from switchtitan.job.checks import checks_between_sections
from switchtitan.job.sections import EvaluationConfig, RunConfig, TrainingConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.observability.metrics import MetricsConfig
from switchtitan.observability.profiler import ProfilerConfig
from switchtitan.optim import OPTIMIZERS, LRScheduleConfig
from switchtitan.spectra.config import SpectrumConfig

_INTRODUCTION = """\
Train the model that a TOML file describes. Without --config, the quickstart.
Every key of the file is an option as well; `none` stands for no value.
The defaults shown are those of the file, or else switchtitan's own.
"""


class JobConfig(Section):
    """All sections. A registry makes a field the union of its rows' sections, of which the key `name` chooses one."""

    job: RunConfig
    model: Annotated[ModelConfig, MODELS]
    method: Annotated[MethodConfig, METHODS]
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS]
    lr_schedule: LRScheduleConfig
    data: DataConfig
    training: TrainingConfig
    parallelism: ParallelismConfig
    compile: CompileConfig
    activation_checkpoint: ActivationCheckpointConfig
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    metrics: MetricsConfig
    spectrum: SpectrumConfig
    profiler: ProfilerConfig


def parse_arguments(
    argv: Sequence[str], num_ranks: int | None = None, overrides_heading: str | None = None
) -> JobConfig:
    """The configuration that a command line asks for: `--config FILE --section.key value ...`, or `--help`.

    Args:
        argv: the command line without the program's name. Without `--config`, the quickstart's file is read.
        num_ranks: ranks of the run, which some keys must fit; by default those that the launcher started.
        overrides_heading: where the keys in `argv` come from if no one typed them; error messages show it.

    Raises:
        ConfigError: with all mistakes in one message.
        SystemExit: with status 0, after printing what `--help` asks for.
    """
    arguments = split_arguments(argv)
    file = QUICKSTART if arguments.config_file is None else find_config(arguments.config_file)
    checks = checks_between_sections(num_ranks or num_ranks_from_launcher(), device_type())
    config = load_config(arguments, file, JobConfig, checks, overrides_heading)
    if arguments.wants_help:
        names = {"model": list(MODELS), "method": list(METHODS), "optimizer": list(OPTIMIZERS)}
        print_help(dict(config), "switchtitan train [--config FILE]", _INTRODUCTION, names)
        raise SystemExit(0)
    return config
