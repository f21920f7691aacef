"""The configuration of a training run, and its command line."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.config import (
    QUICKSTART,
    Expand,
    KeyPath,
    Section,
    find_config,
    help_text,
    load_config,
    raise_together,
    split_arguments,
)
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DataConfig
from switchtitan.distributed.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
)
from switchtitan.distributed.world import device_type, num_ranks_from_launcher
from switchtitan.job.checks import check, keys_without_effect
from switchtitan.job.sections import (
    EvaluationConfig,
    RunConfig,
    SpectrumConfig,
    TrainingConfig,
)
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.observability.config import MetricsConfig, ProfilerConfig
from switchtitan.optim import OPTIMIZERS, LRScheduleConfig

_USAGE = """\
usage: switchtitan train [--config FILE] [--section.key value ...]

Train the model that a TOML file describes. The default file is the quickstart.
Every key of the file is also an option; `none` means no value.
The defaults shown are the values in the file, or switchtitan's defaults."""


class JobConfig(Section):
    """All sections. A registry chooses the class of a section by its key `name`."""

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

    def without_effect(self) -> list[str]:
        """Return messages for keys that other keys of their section leave without effect."""
        return [
            f"[{name}] {message}" for name, section in self for message in section.without_effect()
        ]


@cache
def print_note(note: str) -> None:
    """Print a note on stderr, once; of several ranks only the first one prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def ignore_note(note: str) -> None:
    """For processes that start ranks: the first rank prints the note."""


def parse_arguments(
    argv: Sequence[str],
    num_ranks: int | None = None,
    say: Callable[[str], None] = print_note,
) -> JobConfig:
    """Load the configuration of a training run, and check that its sections fit together.

    Args:
        argv: `--config FILE --section.key value ...`. The default file is the quickstart.
        num_ranks: number of ranks, which some keys must fit; by default the launcher's.
        say: called with a note on each key that is dropped or has no effect.

    Raises:
        ConfigError: with all mistakes in one message.
        SystemExit: with status 0, after `--help`.
    """
    config = parse_unchecked(argv, say)
    num_ranks, device = num_ranks or num_ranks_from_launcher(), device_type()
    raise_together(check(config, num_ranks, device))
    for message in keys_without_effect(config, device):
        say(message)
    return config


def parse_unchecked(argv: Sequence[str], say: Callable[[str], None] = print_note) -> JobConfig:
    """Load a configuration without the checks that depend on its use; see `parse_arguments`."""
    given, wants_help, overrides = split_arguments(argv)
    file = QUICKSTART if given is None else find_config(given)
    if given not in (None, file):
        say(f"using {file}, which is installed with switchtitan")
    config = load_config(JobConfig, file, overrides, EXPANSIONS, say)
    if wants_help:
        print(help_text(config, _USAGE))
        raise SystemExit(0)
    return config


def _model_in_folder(folder: str) -> dict[str, object]:
    # Imported here: most runs do not use it.
    from switchtitan.hub.model_folder import read_model_folder

    return read_model_folder(Path(folder))


EXPANSIONS: dict[KeyPath, Expand] = {("model", "from_folder"): _model_in_folder}
"""Keys that stand for other keys of their section."""
