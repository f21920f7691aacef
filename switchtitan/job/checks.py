"""Checks between sections. Each one receives valid sections and returns error messages."""

import os
import shutil
import sysconfig
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from switchtitan.config.explain import toml_place
from switchtitan.config.load import Check
from switchtitan.config.section import VoidKey
from switchtitan.config.toml_text import toml_value
from switchtitan.contracts import MethodConfig, ModelConfig, OptimizerConfig
from switchtitan.data.config import DEFAULT_TRAINED_VOCAB_SIZE, TRAINED_TOKENIZER, DataConfig
from switchtitan.distributed.config import CompileConfig, ParallelismConfig
from switchtitan.distributed.dtype import (
    Bf16Support,
    bf16_support,
    choose_dtype,
    gpu_problem,
)
from switchtitan.distributed.world import mesh_shape
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.job.sections import EvaluationConfig, TrainingConfig
from switchtitan.methods import METHODS
from switchtitan.models import linear_shapes
from switchtitan.observability import COUNTED_STEP, MetricsConfig, ProfilerConfig


def checks_between_sections(num_ranks: int, device: str) -> list[Check]:
    """Return the checks for `num_ranks` ranks on devices of type `device` ("cpu" or "cuda")."""
    support = bf16_support(torch.device(device))
    return [
        partial(check_dtype, support=support, device=device),
        partial(check_model_device, support=support, device=device),
        partial(check_compiler, device=device),
        partial(check_precision, device=device),
        partial(check_memory_snapshot, device=device),
        *checks_without_device(num_ranks),
    ]


def checks_without_device(num_ranks: int) -> list[Check]:
    """Return the checks for estimates of a run on `num_ranks` ranks, made on another machine."""
    return [
        partial(check_batch_size, num_ranks=num_ranks),
        partial(check_mesh, num_ranks=num_ranks),
        check_method,
        check_method_length,
        check_optimizer,
        check_head,
        check_frozen_weights,
        check_evaluation,
        partial(check_communication, num_ranks=num_ranks),
        partial(check_profiler, num_ranks=num_ranks),
        check_trackers,
        check_vocabulary,
    ]


def evaluation_checks(device: str) -> list[Check]:
    """Return the checks for an evaluation without training, on a device of type `device`."""
    support = bf16_support(torch.device(device))
    return [
        partial(check_model_in_evaluation, support=support, device=device),
        check_evaluation,
        check_vocabulary,
    ]


def check_batch_size(training: TrainingConfig, num_ranks: int) -> list[str]:
    """Every rank must get the same number of full micro-batches."""
    size, unit = training.global_batch_size, num_ranks * training.local_batch_size
    if size % unit == 0:
        return []
    multiples = [
        multiple for multiple in (size // unit * unit, (size // unit + 1) * unit) if multiple
    ]
    return [
        f"[training] global_batch_size = {size}: expected a multiple of ranks x local_batch_size "
        f"= {num_ranks} x {training.local_batch_size} = {unit}; "
        f"write {' or '.join(map(str, multiples))}"
    ]


def check_mesh(parallelism: ParallelismConfig, num_ranks: int) -> list[str]:
    """The number of ranks must equal replicas x shards."""
    try:
        mesh_shape(parallelism, num_ranks)
    except EnvironmentMismatchError as error:
        return [str(error)]
    return []


def check_dtype(training: TrainingConfig, support: Bf16Support, device: str) -> list[str]:
    """bf16 must not be emulated by a GPU."""
    if training.dtype != "bfloat16" or support.is_native or device != "cuda":
        return []
    return [gpu_problem(training.dtype, support.evidence)]


def check_model_device(
    model: ModelConfig, training: TrainingConfig, support: Bf16Support, device: str
) -> list[str]:
    """The model must be able to run on this device, e.g. with its attention backend."""
    try:
        model.check_device(device, choose_dtype(training.dtype, [support]).dtype)
    except EnvironmentMismatchError as error:
        return [str(error)]
    return []


def check_model_in_evaluation(
    model: ModelConfig, training: TrainingConfig, support: Bf16Support, device: str
) -> list[str]:
    """As `check_model_device`, with kernels that every machine has."""
    return check_model_device(model.on_any_machine(), training, support, device)


def check_precision(training: TrainingConfig, device: str) -> list[str | VoidKey]:
    """TF32 and deterministic algorithms are choices of a GPU."""
    problems: list[str | VoidKey] = []
    if training.tf32 and device != "cuda":
        problems.append(
            "[training] tf32 = true has no effect without a GPU: a CPU has no TF32; remove it"
        )
    elif training.tf32 and training.dtype != "float32":
        problem = (
            f"[training] tf32 = true has no effect with dtype = {toml_value(training.dtype)}: "
            'GPUs with TF32 then train in bfloat16; remove it, or set dtype = "float32"'
        )
        problems.append(VoidKey("training.tf32", ("training.dtype",), problem))
    if training.deterministic and device != "cuda":
        problems.append(
            "[training] deterministic = true has no effect on a CPU, where runs are deterministic "
            "anyway; remove it"
        )
    return problems


def check_compiler(compile: CompileConfig, device: str) -> list[str]:
    """torch.compile generates C++ on a CPU and C on a GPU, which need a working compiler."""
    chosen = [key for key, is_on in compile if is_on]
    if not chosen:
        return []
    missing = missing_toolchain(device)
    if missing is None:
        return []
    options = " ".join(f"--compile.{key} false" for key in chosen)
    return [f"[compile] {chosen[0]} = true: {missing}, or pass {options}"]


def check_method(model: ModelConfig, method: MethodConfig) -> list[str]:
    """The method must fit the shapes of the model's linear layers."""
    return method.check_model(linear_shapes(model))


def check_method_length(method: MethodConfig, training: TrainingConfig) -> list[str]:
    """The method's periodic work must happen at least once in the run."""
    return method.check_length(training.steps)


def check_optimizer(
    method: MethodConfig, optimizer: OptimizerConfig, compile: CompileConfig
) -> list[str]:
    """The optimizer must fit the method and the compiler, and its package must be installed."""
    name = f"[optimizer] name = {toml_value(optimizer.name)}"
    problems: list[str] = []
    if method.optimizers is not None and optimizer.name not in method.optimizers:
        able = [
            able_name
            for able_name, config_type in METHODS.config_types().items()
            if config_type.optimizers is None or optimizer.name in config_type.optimizers
        ]
        problems.append(
            f"{name}: [method] name = {toml_value(method.name)} cannot train with it; choose "
            f"{' or '.join(sorted(method.optimizers))}, or a method that can: "
            f"{', '.join(sorted(able))}"
        )
    if optimizer.package is not None and not _is_installed(optimizer.package):
        problems.append(
            f"{name}: needs the package {optimizer.package}; run pip install "
            f"'switchtitan[{optimizer.package}]', or choose another optimizer"
        )
    if compile.optimizer and not optimizer.can_compile:
        problems.append(f"[compile] optimizer = true: {name} cannot be compiled; remove it")
    return problems


def check_head(model: ModelConfig, optimizer: OptimizerConfig) -> list[str]:
    """An optimizer that treats the head apart needs one with a weight of its own."""
    if not (optimizer.needs_head and model.weight_copies()):
        return []
    return [
        f"[optimizer] name = {toml_value(optimizer.name)}: treats the head's weight apart, and the "
        "model's head is tied to the embedding; untie it (for LLaMA, [model] tied_head = false), "
        "or choose another optimizer"
    ]


def check_frozen_weights(
    method: MethodConfig, parallelism: ParallelismConfig, training: TrainingConfig
) -> list[VoidKey]:
    """Keys for frozen weights need a method that freezes weights."""
    keys = {
        ("parallelism", "frozen_weights"): (parallelism.frozen_weights, "shard"),
        ("training", "frozen_dtype"): (training.frozen_dtype, "float32"),
    }
    return [
        VoidKey(
            ".".join(key),
            ("method.name",),
            f"{toml_place(key, value)} has no effect: "
            f"{toml_place(('method', 'name'), method.name)} trains all weights; "
            "remove it, or choose a method that freezes weights",
        )
        for key, (value, default) in keys.items()
        if value != default and not method.freezes_weights
    ]


def check_evaluation(evaluation: EvaluationConfig, data: DataConfig) -> list[str | VoidKey]:
    """An evaluation needs at least one sequence, and its split must exist."""
    limit = f"expected at least one sequence, [data] seq_len = {data.seq_len}"
    problems: list[str | VoidKey] = [
        f"[evaluation] {key} = {tokens}: {limit}"
        for key, tokens in (("tokens", evaluation.tokens), ("test_tokens", evaluation.test_tokens))
        if tokens is not None and tokens < data.seq_len
    ]
    if evaluation.test_tokens is not None and data.test_fraction is None:
        problem = (
            f"[evaluation] test_tokens = {evaluation.test_tokens}: there is no test split; "
            "set [data] test_fraction, or remove test_tokens"
        )
        problems.append(VoidKey("evaluation.test_tokens", ("data.test_fraction",), problem))
    return problems


def check_vocabulary(model: ModelConfig, data: DataConfig) -> list[str]:
    """A tokenizer trained here, even if only for offline use, must fit the model."""
    if data.tokenizer != TRAINED_TOKENIZER and data.offline_dataset is None:
        return []
    vocab_size = data.vocab_size or DEFAULT_TRAINED_VOCAB_SIZE
    if vocab_size <= model.vocab_size:
        return []
    return [
        f"[data] vocab_size = {vocab_size}: expected at most [model] vocab_size = "
        f"{model.vocab_size}; lower [data] vocab_size or increase [model] vocab_size"
    ]


def check_communication(
    metrics: MetricsConfig, training: TrainingConfig, num_ranks: int
) -> list[str | VoidKey]:
    """Counting communication needs several ranks, and the step that is counted."""
    if not metrics.communication:
        return []
    key = "[metrics] communication = true has no effect"
    if num_ranks == 1:
        return [f"{key}: one rank sends nothing; remove it, or start several ranks"]
    if training.steps < COUNTED_STEP:
        problem = (
            f"{key}: the bytes of step {COUNTED_STEP} are counted, and [training] steps = "
            f"{training.steps}; remove it, or train longer"
        )
        return [VoidKey("metrics.communication", ("training.steps",), problem)]
    return []


def check_trackers(metrics: MetricsConfig) -> list[str]:
    """A tracker needs its package."""
    return [
        f"[metrics] trackers: {tracker} needs the package {tracker}; run pip install "
        f"'switchtitan[{tracker}]', or remove it from trackers"
        for tracker in metrics.trackers
        if not _is_installed(tracker)
    ]


def check_profiler(profiler: ProfilerConfig, num_ranks: int) -> list[str | VoidKey]:
    """The ranks to trace must exist, and what to trace needs a trace."""
    writes_snapshot = profiler.memory_snapshot_step is not None
    unused = []
    if profiler.memory and not profiler.enabled:
        unused.append("memory")
    if profiler.ranks != (0,) and not (profiler.enabled or writes_snapshot):
        unused.append("ranks")
    if unused:
        needed = ("profiler.enabled", "profiler.memory_snapshot_step")
        problem = "[profiler] {} has no effect without enabled = true; remove it, or set enabled"
        return [VoidKey(f"profiler.{key}", needed, problem.format(key)) for key in unused]
    if profiler.ranks == "all":
        return []
    if not profiler.ranks:
        return ["[profiler] ranks = []: traces nothing; name a rank, or set enabled = false"]
    return [
        f"[profiler] ranks: there is no rank {rank}; expected ranks from 0 to {num_ranks - 1}"
        for rank in profiler.ranks
        if rank >= num_ranks
    ]


def check_memory_snapshot(
    profiler: ProfilerConfig, training: TrainingConfig, device: str
) -> list[str | VoidKey]:
    """A snapshot of GPU memory needs a GPU, and a step of the run."""
    step = profiler.memory_snapshot_step
    if step is None:
        return []
    key = f"[profiler] memory_snapshot_step = {step} has no effect"
    if device != "cuda":
        return [f"{key} without a GPU: only torch's GPU memory has a history; remove it"]
    if step > training.steps:
        problem = f"{key}: [training] steps = {training.steps}; lower it, or remove it"
        return [VoidKey("profiler.memory_snapshot_step", ("training.steps",), problem)]
    return []


def missing_toolchain(device: str) -> str | None:
    """Return what is missing to compile for a device of this type, and what to install.

    Inductor builds C++ for a CPU, and Triton builds launchers in C for a GPU. None: nothing is
    missing.
    """
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


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A folder of this name in the working directory has no origin: wandb writes one.
    return spec is not None and spec.origin is not None
