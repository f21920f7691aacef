"""The configuration of a training run: its sections, and its command line."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.config import (
    QUICKSTART,
    Section,
    find_config,
    help_text,
    load_config,
    parse_toml,
    read_with_bases,
    split_arguments,
)
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DataConfig
from switchtitan.distributed.config import (
    ActivationCheckpointConfig,
    CompileConfig,
    ParallelismConfig,
)
from switchtitan.distributed.world import device_type, place_from_launcher
from switchtitan.hub.initial_weights import read_model_folder
from switchtitan.job.checks import check, keys_without_effect
from switchtitan.methods import METHODS
from switchtitan.models import MODELS, plain_model
from switchtitan.observability.config import MetricsConfig, ProfilerConfig
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.lr_schedule import LRScheduleConfig

_USAGE = """\
usage: switchtitan train [--config FILE] [--section.key value ...]

Train the model that a TOML file describes. The default file is the quickstart.
Every key of the file is also an option; `none` means no value.
The defaults shown are the values in the file, or switchtitan's defaults."""


class RunConfig(Section):
    """`[job]`: name, output folder and seed of the run."""

    name: str = Field(min_length=1)
    """Name of the run in logs and TensorBoard."""
    output_dir: Annotated[Path, AfterValidator(Path.expanduser)]
    """Folder for checkpoints, logs and traces, relative to the working directory; created if
    missing."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Determines initial weights, order of the data and dropout."""
    stop_signal: Literal["SIGUSR1", "SIGUSR2"] | None = "SIGUSR1"
    """Signal, next to SIGTERM and SIGINT, after which the run finishes its step, saves and stops,
    such as the one that a batch system sends before it pre-empts a job; "none" receives no other
    signal."""


class TrainingConfig(Section):
    """`[training]`: number of steps, batch size and dtypes."""

    steps: int = Field(ge=1)
    """Optimizer steps of the run, including those before a resume."""
    global_batch_size: int = Field(ge=1)
    """Sequences per optimizer step over all ranks; a multiple of ranks x local_batch_size."""
    local_batch_size: int = Field(ge=1)
    """Sequences per rank and micro-step; lower it if memory is short. Gradients are accumulated
    over micro-steps."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm; "none" disables clipping."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """dtype of activations and gradients. "auto" is bfloat16 if all devices multiply it natively
    (NVIDIA GPUs since Ampere, AMD GPUs, x86 CPUs with AVX512-BF16), else float32; a resumed run
    keeps its checkpoint's. "bfloat16" is an error on older GPUs, and slow on other CPUs.
    Updates are computed in fp32."""
    frozen_dtype: Literal["float32", "int16"] = "float32"
    """dtype of frozen weights; a resumed run cannot change it. int16 takes half the memory: fixed
    point, with a power of two as the step of each row. Changes are rounded stochastically: unbiased
    (in a 128 x 128 example, the error is 0.7 % of the norm after 10 000 changes). No effect if all
    weights train."""
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of trained weights and their gradients; a resumed run cannot change it. With bfloat16 a
    weight takes three bytes and its gradient two: the optimizer keeps eight more bits of each
    weight, which the model does not see, and rounds updates stochastically to those 24 bits. Only
    with adamw8bit and muon8bit, for full_rank, lora and switchlora. Gradients of several
    micro-batches are summed in bfloat16 with [parallelism] accumulate_gradients = "sharded"."""
    tf32: bool = False
    """Whether a GPU may round the factors of forward's and backward's fp32 products to TF32 (10
    bits), which is faster. Updates always multiply in fp32. Only with dtype = "float32" on a
    GPU."""
    deterministic: bool = False
    """Whether a GPU uses deterministic algorithms only, so that a resumed run is bitwise equal to
    one that was not stopped, on as many GPUs of the same kind. Slower. An operation without such an
    algorithm is an error. Not on a CPU, where runs always are."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if the loss or the gradient is inf or nan on any rank. `stop` ends the run at the
    next report, evaluation or save, before anything more is saved. `skip` skips the update of that
    batch on all ranks: nothing but the count of skipped batches changes, and training continues as
    if the batch were not in the data; 100 in a row end the run. With `skip` the host waits for the
    device before every update, since it must know the norm; on a CPU, that takes no time."""


class EvaluationConfig(Section):
    """`[evaluation]`: loss on held-out sequences."""

    interval: int = Field(default=1000, ge=1)
    """Optimizer steps between evaluations. The model is also evaluated before the first and after
    the last step, unless the run is shorter than the interval."""
    tokens: int = Field(default=10_000_000, ge=1)
    """Validation tokens per evaluation, rounded down to full sequences; at least data.seq_len."""
    test_tokens: int | None = Field(default=None, ge=1)
    """Test tokens on which the trained model is evaluated once, after the last step, rounded down
    to full sequences; at least data.seq_len. Needs data.test_fraction. "none" disables it."""


class SpectrumConfig(Section):
    """How often to measure the rank of the change of the linear layers' weights since step 0."""

    interval: int | None = Field(default=None, ge=1)
    """Optimizer steps between two measurements, at least 1; the last step is also measured.
    Default: no measurement. Each gathers the dense weights on the main rank and takes O(out * in *
    min(out, in)) time per layer."""


class JobConfig(Section):
    """All sections. A registry chooses the class of a section by its key `name`."""

    expansions: ClassVar = {
        ("model", "from_folder"): lambda folder: read_model_folder(Path(folder).expanduser())
    }

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


@cache
def print_note(note: str) -> None:
    """Prints a note on stderr, once; of several ranks only the first one prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def parse_arguments(
    argv: Sequence[str], num_ranks: int | None = None, say: Callable[[str], None] = print_note
) -> JobConfig:
    """Loads the configuration of a training run, and checks that its sections fit together. Raises
    a ConfigError with all mistakes in one message; SystemExit after `--help`.

    Args:
        argv: `--config FILE --section.key value ...`. The default file is the quickstart.
        num_ranks: number of ranks, which some keys must fit; by default the launcher's.
        say: called with a note on each key that is dropped or has no effect.
    """
    config = parse_unchecked(argv, say)
    num_ranks, device = num_ranks or place_from_launcher()[1], device_type()
    check(config, num_ranks, device)
    for message in keys_without_effect(config, num_ranks, device):
        say(message)
    if device == "cuda" and ("data", "offline_dataset") not in split_arguments(argv)[2]:
        # Hours of training on another corpus must be asked for. On a CPU it is a trial.
        data = config.data.model_copy(update={"offline_dataset": None})
        return config.model_copy(update={"data": data})
    return config


def parse_unchecked(argv: Sequence[str], say: Callable[[str], None] = print_note) -> JobConfig:
    """Loads a configuration without the checks that depend on its use; see `parse_arguments`."""
    given, wants_help, overrides = split_arguments(argv)
    file = QUICKSTART if given is None else find_config(given)
    if given not in (None, file):
        say(f"using {file}, which is installed with switchtitan")
    config = load_config(JobConfig, read_with_bases(file), overrides, say)
    method = config.method.completed(lambda: plain_model(config.model.on_any_machine()))
    config = config.model_copy(update={"method": method})
    if wants_help:
        print(help_text(config, _USAGE))
        raise SystemExit(0)
    return config


def parse_saved(text: str) -> JobConfig:
    """Loads the configuration that a run has saved, from its text; see `parse_unchecked`."""
    name = "the saved configuration"
    return load_config(JobConfig, [(name, parse_toml(text, name))], {}, print_note)
