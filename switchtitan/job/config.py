"""The configuration of a training run, and its command line."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.config.command_line import HELP_ALL, split_arguments
from switchtitan.config.expansions import Expand
from switchtitan.config.fields import KeyPath
from switchtitan.config.load import Check, load_config
from switchtitan.config.section import Section
from switchtitan.config.shipped import QUICKSTART, find_config
from switchtitan.config.void_keys import print_note
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DataConfig
from switchtitan.distributed.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
)
from switchtitan.distributed.world import device_type, num_ranks_from_launcher
from switchtitan.job.checks import checks_between_sections
from switchtitan.job.sections import (
    EvaluationConfig,
    RunConfig,
    SpectrumConfig,
    TrainingConfig,
)
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.observability.config import MetricsConfig
from switchtitan.observability.profiler import ProfilerConfig
from switchtitan.optim import OPTIMIZERS, LRScheduleConfig

_USAGE = "switchtitan train [--config FILE]"
_INTRODUCTION = """\
Train the model that a TOML file describes. The default file is the quickstart.
Every key of the file is also an option; `none` means no value.
The defaults shown are the values in the file, or switchtitan's defaults.
"""
_COMMON_KEYS = (
    "job.output_dir",
    "model.size",
    "method.name",
    "method.rank",
    "optimizer.lr",
    "data.dataset",
    "data.path",
    "data.seq_len",
    "training.steps",
    "training.global_batch_size",
    "training.local_batch_size",
    "checkpoint.interval",
    "evaluation.interval",
)
"""Keys that `--help` describes, if the configuration has them; `--help-all` describes all."""


class JobConfig(Section):
    """All sections. A registry makes a field a union of section classes; `name` chooses one."""

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
    argv: Sequence[str],
    num_ranks: int | None = None,
    overrides_heading: str | None = None,
    checks: Sequence[Check] | None = None,
    say: Callable[[str], None] = print_note,
) -> JobConfig:
    """Load the configuration of a command line: `--config FILE --section.key value ...`.

    Args:
        argv: the command line without the program's name. The default file is the quickstart.
        num_ranks: number of ranks, which some keys must fit; by default the launcher's.
        overrides_heading: for keys in `argv` that a program made: their heading in error messages.
        checks: checks between sections; by default those for training on `num_ranks` ranks.
        say: called with a note on each key of the file that the command line leaves no effect.

    Raises:
        ConfigError: with all mistakes in one message.
        SystemExit: with status 0, after `--help` or `--help-all`.
    """
    arguments = split_arguments(argv)
    file = QUICKSTART if arguments.config_file is None else find_config(arguments.config_file)
    if arguments.wants_help:
        checks = ()
    elif checks is None:
        checks = checks_between_sections(num_ranks or num_ranks_from_launcher(), device_type())
    expansions: dict[KeyPath, Expand] = {("model", "from_folder"): _model_in_folder}
    config = load_config(arguments, file, JobConfig, checks, overrides_heading, expansions, say)
    if arguments.wants_help:
        _print_help(config, describes_all=HELP_ALL in arguments.flags)
        raise SystemExit(0)
    return config


def _print_help(config: JobConfig, describes_all: bool) -> None:
    # Imported here: a run does not use it.
    from switchtitan.config.help import print_full_help, print_short_help

    names = {"model": list(MODELS), "method": list(METHODS), "optimizer": list(OPTIMIZERS)}
    if describes_all:
        print_full_help(dict(config), _USAGE, _INTRODUCTION, names)
    else:
        print_short_help(dict(config), _USAGE, _INTRODUCTION, _COMMON_KEYS, names)


def _model_in_folder(folder: str) -> dict[str, object]:
    # Imported here: most runs do not use it.
    from switchtitan.hub.model_folder import read_model_folder

    return read_model_folder(Path(folder))
