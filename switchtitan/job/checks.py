"""Checks between sections: what a run cannot do, and keys that it does not use."""

import os
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from switchtitan.config import raise_together
from switchtitan.data.config import TRAINED_TOKENIZER
from switchtitan.distributed.dtype import bf16_support, choose_dtype, gpu_problem
from switchtitan.distributed.world import mesh_shape
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.methods import optimizer_problems
from switchtitan.models import plain_model
from switchtitan.registry import is_installed, needs_package, toml_value

if TYPE_CHECKING:  # it calls these checks
    from switchtitan.job.config import JobConfig


def check(config: "JobConfig", num_ranks: int, device: str | None) -> None:
    """Raises a ConfigError that says all that keeps a configuration from being trained.

    Args:
        device: "cpu" or "cuda"; None for an estimate of a run on another machine.
    """
    model = plain_model(config.model.on_any_machine())
    problems = [
        *_check_ranks(config, num_ranks),
        *config.method.check_model(model),
        *config.method.check_length(config.training.steps),
        *optimizer_problems(config.method, config.optimizer, model),
        *_check_trained_dtype(config),
        *check_held_out(config),
        *_check_reports(config, num_ranks),
    ]
    if device is not None:
        problems += [*check_device(config, device), *_check_compiler(config, device)]
    raise_together(problems)


def check_held_out(config: "JobConfig") -> list[str]:
    """Returns why a configuration's model cannot be evaluated on its data."""
    data, problems = config.data, []
    for key in ("tokens", "test_tokens"):
        tokens = getattr(config.evaluation, key)
        if tokens is not None and tokens < data.seq_len:
            problems.append(
                f"[evaluation] {key} = {tokens}: expected at least one sequence, [data] seq_len = "
                f"{data.seq_len}"
            )
    if config.evaluation.test_tokens is not None and data.test_fraction is None:
        problems.append(
            f"[evaluation] test_tokens = {config.evaluation.test_tokens}: there is no test split; "
            "set [data] test_fraction, or remove test_tokens"
        )
    vocab_size = data.trained_vocab_size
    trains_tokenizer = data.tokenizer == TRAINED_TOKENIZER or data.offline_dataset is not None
    if trains_tokenizer and vocab_size > config.model.vocab_size:
        problems.append(
            f"[data] vocab_size = {vocab_size}: expected at most [model] vocab_size = "
            f"{config.model.vocab_size}; lower the first or increase the second"
        )
    return problems


def check_device(config: "JobConfig", device: str) -> list[str]:
    """Returns why a model cannot compute on a device, e.g. with its attention backend."""
    support, dtype = bf16_support(torch.device(device)), config.training.dtype
    problems = []
    if dtype == "bfloat16" and device == "cuda" and not support.is_native:
        problems.append(gpu_problem(dtype, support.evidence))
    try:
        config.model.check_device(device, choose_dtype(dtype, [support]).dtype)
    except EnvironmentMismatchError as error:
        problems.append(str(error))
    return problems


def keys_without_effect(config: "JobConfig", num_ranks: int, device: str) -> list[str]:
    """Returns a message for each key that this run does not use, and for an endless warm-up."""
    training, profiler, on_gpu = config.training, config.profiler, device == "cuda"
    trains_all = f"with [method] name = {toml_value(config.method.name)}, which trains all weights"
    _, shard = mesh_shape(config.parallelism, num_ranks)
    is_one = training.global_batch_size == num_ranks * training.local_batch_size
    sums_alike = is_one or (shard == 1 and training.trained_dtype == "float32")
    starts_late = profiler.start_step > training.steps
    snapshot_step = profiler.memory_snapshot_step
    observes = profiler.enabled or snapshot_step is not None
    is_late = snapshot_step is not None and snapshot_step > training.steps
    void = [f"[{name}] {text}" for name, section in config for text in section.without_effect()]
    for is_void, section, key, cause in (
        (not on_gpu, "training", "tf32", "on a CPU, which has no TF32"),
        (on_gpu and training.dtype != "float32", "training", "tf32", 'without dtype = "float32"'),
        (not on_gpu, "training", "deterministic", "on a CPU, where runs are deterministic anyway"),
        (not config.method.freezes_weights, "parallelism", "frozen_weights", trains_all),
        (not config.method.freezes_weights, "training", "frozen_dtype", trains_all),
        (sums_alike, "parallelism", "accumulate_gradients", "with one micro-batch or one shard"),
        (starts_late, "profiler", "enabled", "with start_step after the last step"),
        (not profiler.enabled, "profiler", "memory", "without enabled = true"),
        (not observes, "profiler", "ranks", "without enabled = true or memory_snapshot_step"),
        (not on_gpu, "profiler", "memory_snapshot_step", "without a GPU"),
        (on_gpu and is_late, "profiler", "memory_snapshot_step", "after the last step"),
    ):
        if is_void and not getattr(config, section).is_default(key):
            value = toml_value(getattr(getattr(config, section), key))
            void.append(f"[{section}] {key} = {value} has no effect {cause}")
    notes = [f"{message}; remove it" for message in void]
    of_model = getattr(config.model, "tuned_hidden_size", None)
    of_rates = config.optimizer.tuned_hidden_size
    if of_model != of_rates and config.checkpoint.initial_weights is None:
        notes.append(
            f"tuned_hidden_size = {toml_value(of_model)} in [model] and {toml_value(of_rates)} in "
            "[optimizer]: initial values and rates follow different sizes; set both, or neither"
        )
    if (warmup_steps := config.lr_schedule.warmup_steps) >= training.steps:
        notes.append(
            f"[lr_schedule] warmup_steps = {warmup_steps} is not below [training] steps = "
            f"{training.steps}: the learning rate only rises; lower warmup_steps"
        )
    return notes


def _check_ranks(config: "JobConfig", num_ranks: int) -> list[str]:
    """Every rank gets equally many full micro-batches; ranks are replicas x shards."""
    training, problems = config.training, []
    size, unit = training.global_batch_size, num_ranks * training.local_batch_size
    if size % unit:
        multiples = [size - size % unit, size - size % unit + unit]
        problems.append(
            f"[training] global_batch_size = {size}: expected a multiple of ranks x "
            f"local_batch_size = {num_ranks} x {training.local_batch_size} = {unit}; write "
            f"{' or '.join(str(multiple) for multiple in multiples if multiple)}"
        )
    try:
        mesh_shape(config.parallelism, num_ranks)
    except EnvironmentMismatchError as error:
        problems.append(str(error))
    return problems


def _check_trained_dtype(config: "JobConfig") -> list[str]:
    """Only some methods and optimizers train weights in bf16."""
    method, optimizer = config.method, config.optimizer
    dtype, can_train = config.training.trained_dtype, method.trains_bf16 and optimizer.trains_bf16
    if dtype == "float32" or can_train:
        return []
    return [
        f"[training] trained_dtype = {toml_value(dtype)}: {method.name} with {optimizer.name} "
        "trains weights in float32; choose [optimizer] name = adamw8bit or muon8bit, with [method] "
        "name = full_rank, lora or switchlora, or remove the key"
    ]


def _check_reports(config: "JobConfig", num_ranks: int) -> list[str]:
    """A tracker's package must be installed, and the ranks to trace must exist."""
    problems = [
        needs_package(f"[metrics] trackers: {tracker}", tracker)
        for tracker in config.metrics.trackers
        if not is_installed(tracker)
    ]
    profiler, ranks = config.profiler, config.profiler.ranks
    observes = profiler.enabled or profiler.memory_snapshot_step is not None
    if observes and ranks != "all" and (not ranks or max(ranks) >= num_ranks):
        problems.append(
            f"[profiler] ranks = {toml_value(ranks)}: expected at least one rank, from 0 to "
            f"{num_ranks - 1}"
        )
    return problems


def _check_compiler(config: "JobConfig", device: str) -> list[str]:
    chosen = [key for key, is_on in config.compile if is_on]
    missing = missing_toolchain(device) if chosen else None
    if missing is None:
        return []
    options = " ".join(f"--compile.{key} false" for key in chosen)
    return [f"[compile] {chosen[0]} = true: {missing}, or pass {options}"]


def missing_toolchain(device: str) -> str | None:
    """Returns what is missing to compile for a device of this type, and what to install, or None.
    Inductor builds C++ for a CPU, and Triton builds launchers in C for a GPU."""
    if device == "cpu":
        needs, wanted = "on a CPU it needs", "a C++ compiler; install g++"
        compilers = [os.environ.get("CXX", "g++")]
    else:
        needs, wanted = "on a GPU it needs", "a C compiler; install gcc"
        given = os.environ.get("CC")
        compilers = [given] if given else ["gcc", "clang"]  # as in triton/runtime/build.py
    if not any(map(shutil.which, compilers)):
        return f"{needs} {wanted}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"{needs} Python's header files; install python3-dev"
    folder = Path(torch.__file__).parent
    # Inductor does not quote paths on the linker's command line.
    if device == "cpu" and " " in str(folder):
        return f"{needs} torch in a path without spaces, not {folder}; use another environment"
    return None
