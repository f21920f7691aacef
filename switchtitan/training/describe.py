"""What a run says of itself: its identity, its facts, its configuration, and the log's start."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from switchtitan.config import flatten, parse_toml, toml_value
from switchtitan.data import Corpus
from switchtitan.distributed.dtype import ComputeDtype
from switchtitan.distributed.world import World, device_name
from switchtitan.errors import OutputError
from switchtitan.files import write_atomically
from switchtitan.job.config import JobConfig
from switchtitan.observability.environment import commit, versions
from switchtitan.observability.log import configure_logging
from switchtitan.registry import Section
from switchtitan.training.step import Stepper

logger = logging.getLogger(__name__)

_COMPARED_SECTIONS = ("model", "method", "optimizer", "lr_schedule", "training", "parallelism")
_UNLISTED_KEYS = ("job.name", "job.output_dir", "data.cache_dir", "training.dtype")
"""Keys whose changes are not listed on resume; what `dtype` chose is compared apart."""

CONFIG_FILE = "config.toml"
"""File in the output folder with the configuration that the run started with."""
_RESUMED_CONFIG = re.compile(r"config-from-step-(\d+)\.toml")


def run_identity(config: JobConfig, corpus: Corpus) -> dict:
    """Returns what must be equal in a run and a checkpoint that it resumes from: what determines
    the meaning of the tensors and of the position in the data."""
    return {
        "model": _without_resumable_keys(config.model),
        "method": _without_resumable_keys(config.method),
        "optimizer": {"name": config.optimizer.name},
        "data": {"seq_len": config.data.seq_len},
        "training": config.training.model_dump(include={"global_batch_size", "frozen_dtype"}),
        "job": {"seed": config.job.seed},
        "corpus": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            # The source of a mixture whose tokenizer the run has.
            **({"first_source": corpus.index.fingerprint} if corpus.parts else {}),
        },
    }


def completed_identity(saved: Mapping[str, object], config: JobConfig) -> dict[str, object]:
    """Returns a checkpoint's identity with the defaults of keys that are newer than it."""
    completed = dict(saved)
    sections: dict[str, Section] = {"model": config.model, "method": config.method}
    for name, section in sections.items():
        if isinstance(values := saved.get(name), Mapping):
            defaults = _without_resumable_keys(type(section).model_construct())
            completed[name] = {**defaults, **values}
    return completed


def _without_resumable_keys(section: Section) -> dict[str, object]:
    return section.model_dump(mode="json", exclude=set(section.resumable_keys))


def run_facts(
    config: JobConfig, world: World, model: nn.Module, corpus: Corpus, compute_dtype: ComputeDtype
) -> dict[str, object]:
    """Returns the facts in `results.json`: configuration, hardware, versions, corpus and sizes."""
    return {
        "method": config.method.model_dump(mode="json"),
        "optimizer": config.optimizer.model_dump(mode="json"),
        "seed": config.job.seed,
        "compute_dtype": compute_dtype.name,
        "compute_dtype_reason": compute_dtype.reason,
        "device": device_name(world.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_ranks": world.size,
        "num_threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit() if world.is_main else None,
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "num_parameters": count_parameters(model),
    }


def compared_values(config: JobConfig, num_ranks: int) -> dict[str, bool | int | float | str]:
    """Returns the values of a configuration by which runs are compared, by dotted key."""
    values: dict[str, object] = {
        f"{section}.{key}": value
        for section in _COMPARED_SECTIONS
        for key, value in getattr(config, section).model_dump(mode="json").items()
        if value is not None
    }
    values |= {"data.dataset": config.data.dataset, "data.seq_len": config.data.seq_len}
    values |= {"job.seed": config.job.seed, "ranks": num_ranks}
    return {
        key: value if isinstance(value, int | float | str) else toml_value(value)
        for key, value in values.items()
    }


def describe_run(
    config: JobConfig,
    stepper: Stepper,
    corpus: Corpus,
    compute_dtype: ComputeDtype,
    checkpoint: Path | None,
    changes: list[str],
) -> None:
    """Logs the model, corpus, devices, dtype, starting point, and changes since the checkpoint."""
    counts = count_parameters(stepper.model)
    sizes = [f"{number / 1e6:.2f} M {kind}" for kind, number in counts.items() if number]
    logger.info("%s: %s", config.job.name, ", ".join(sizes))
    logger.info("corpus %s: %s", corpus.name, corpus.description)
    world, (replicate, shard) = stepper.world, stepper.world.mesh.shape
    layout = f"replicate {replicate} x shard {shard}"
    logger.info("%d rank(s) on %s: %s", world.size, device_name(world.device), layout)
    has_one = config.training.global_batch_size == world.size * config.training.local_batch_size
    if config.parallelism.accumulate_gradients == "sharded" and (has_one or shard == 1):
        logger.info(
            '[parallelism] accumulate_gradients = "sharded" saves nothing: %s',
            "a step has one micro-batch" if has_one else "each rank holds all gradients",
        )
    logger.info("compute dtype: %s", compute_dtype)
    if checkpoint is None:
        logger.info("starting a new run in %s", config.job.output_dir)
    else:
        logger.info("resuming from %s", checkpoint)
    if changes and world.is_main:
        logger.warning("changed since that checkpoint: %s", "; ".join(changes))
    compiles = config.compile.blocks or config.compile.loss or config.compile.optimizer
    if compiles and stepper.state.step < config.training.steps:
        logger.info(
            "compiling: the first step takes a minute or more; later runs use the cache; "
            "speed and ETA are measured from the second step"
        )


def changed_keys(saved_toml: str, current_toml: str) -> list[str]:
    """Returns the keys whose values differ in two configurations, as `key: old -> new`."""
    before, now = (
        flatten(parse_toml(text, "the saved configuration")) for text in (saved_toml, current_toml)
    )
    return [
        f"{key}: {toml_value(before[key])} -> {toml_value(now[key])}"
        for key in now
        if key in before and before[key] != now[key] and key not in _UNLISTED_KEYS
    ]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the values of trainable parameters, frozen parameters and buffers over all ranks."""
    parameters = list(model.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
    }


def start_output(output_dir: Path, resolved: str, world: World, step: int, num_steps: int) -> None:
    """Opens the run's log file; writes its configuration if steps are left after step `step`.

    Raises:
        OutputError: on every rank, if that fails.
    """

    def start() -> None:
        if not world.is_main:
            return
        try:
            configure_logging(is_main=True, log_file=output_dir / "train.log")
            if step < num_steps:
                write_config(output_dir, resolved, step)
        except OSError as error:
            raise OutputError(
                f"[job] output_dir = {str(output_dir)!r}: cannot be written ({error}); free space, "
                "or choose another"
            ) from error

    world.together(start)


def write_config(output_dir: Path, resolved: str, step: int) -> None:
    """Writes the configuration that a run has from `step` on, if it is another than before."""
    if step == 0:
        write_atomically(output_dir / CONFIG_FILE, resolved)
        return
    newest, _ = newest_config_file(output_dir)
    if not newest.is_file() or newest.read_text(encoding="utf-8") != resolved:
        write_atomically(output_dir / f"config-from-step-{step}.toml", resolved)


def newest_config_file(output_dir: Path) -> tuple[Path, int]:
    """Returns the file with the configuration of a run's last part, and the step it is from."""
    files = {0: output_dir / CONFIG_FILE}
    for file in output_dir.iterdir():
        if match := _RESUMED_CONFIG.fullmatch(file.name):
            files[int(match.group(1))] = file
    step = max(files)
    return files[step], step
