"""The whole configuration of a training run, and how it is read from the command line."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pydantic import create_model

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.config.draft import SectionTypes
from switchtitan.config.help import print_help
from switchtitan.config.load import load_sections
from switchtitan.config.overrides import split_arguments
from switchtitan.config.section import Section
from switchtitan.config.shipped import QUICKSTART, find_config
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DataConfig
from switchtitan.distributed.config import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from switchtitan.distributed.world import device_type, num_ranks_from_launcher
from switchtitan.job.checks import checks_between_sections
from switchtitan.job.sections import EvaluationConfig, RunConfig, TrainingConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.observability.metrics import MetricsConfig
from switchtitan.observability.profiler import ProfilerConfig
from switchtitan.optim import OPTIMIZERS, LRScheduleConfig
from switchtitan.registry import Registry
from switchtitan.spectra.config import SpectrumConfig

_INTRODUCTION = """\
Trains the model that a TOML file describes: --config FILE, else the quickstart.
Every key of the file can be given here as well; none stands for no value.
The defaults shown are what the file says, or else switchtitan's own.
"""


class JobConfig(Section):
    """All sections. Those chosen by name have the class that the name selects in its registry."""

    job: RunConfig
    model: ModelConfig
    method: MethodConfig
    optimizer: OptimizerConfig
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


NAMED_SECTIONS: dict[str, Registry[Any, Any]] = {"model": MODELS, "method": METHODS, "optimizer": OPTIMIZERS}
"""The sections whose key `name` chooses their class, and the registries to choose from."""


def parse_arguments(argv: Sequence[str], num_ranks: int | None = None) -> JobConfig:
    """The configuration that a command line asks for: `--config FILE --section.key value ...`, or `--help`.

    Args:
        argv: the command line without the program's name. Without `--config`, the quickstart's file is read.
        num_ranks: ranks of the run, which some keys must fit; by default those that the launcher started.

    Raises:
        ConfigError: with all mistakes in one message.
        SystemExit: with status 0, after printing what `--help` asks for.
    """
    arguments = split_arguments(argv)
    file = QUICKSTART if arguments.config_file is None else find_config(arguments.config_file)
    checks = checks_between_sections(num_ranks or num_ranks_from_launcher(), device_type())
    sections = load_sections(arguments, file, section_types(), checks)
    names = {section: sections[section].name for section in NAMED_SECTIONS}  # type: ignore[attr-defined]
    config = concrete_job_config(names)(**sections)
    if arguments.wants_help:
        print_help(config, "switchtitan train [--config FILE]", _INTRODUCTION)
        raise SystemExit(0)
    return config


def concrete_job_config(names: Mapping[str, str]) -> type[JobConfig]:
    """JobConfig with the classes that names choose, e.g. {"model": "llama", "method": "lora", ...}."""
    return _job_config_with(tuple(sorted(names.items())))


def section_types() -> SectionTypes:
    """Every section's class, or its classes by name."""
    plain: dict[str, Any] = {name: field.annotation for name, field in JobConfig.model_fields.items()}
    named = {
        section: {name: registry[name].config_type for name in registry}
        for section, registry in NAMED_SECTIONS.items()
    }
    return {**plain, **named}


@cache
def _job_config_with(names: tuple[tuple[str, str], ...]) -> type[JobConfig]:
    """The same class for the same names, without which no two configurations would be equal."""
    chosen = {section: NAMED_SECTIONS[section][name].config_type for section, name in names}
    fields: dict[str, Any] = {section: (chosen[section], ...) for section in chosen}
    return create_model("JobConfig", __base__=JobConfig, **fields)
