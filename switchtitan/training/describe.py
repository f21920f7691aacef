"""What a run says of itself: its identity, what it resumes from, its facts, and the log's start."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from switchtitan.checkpoint.load import check_same_run, read_metadata
from switchtitan.checkpoint.save import CheckpointMetadata
from switchtitan.config import flatten, parse_toml, resolved_toml
from switchtitan.data.corpus import Corpus
from switchtitan.distributed.dtype import ComputeDtype
from switchtitan.distributed.world import World, device_name
from switchtitan.errors import CheckpointError
from switchtitan.job.config import JobConfig
from switchtitan.numerics.fixed_point import num_values
from switchtitan.observability.environment import commit, versions
from switchtitan.optim.lr_schedule import LRScheduleConfig, build_lr_schedule
from switchtitan.registry import NONE, Section, explain, toml_value
from switchtitan.training.step import Stepper, TrainState

logger = logging.getLogger(__name__)

_UNLISTED_KEYS = (
    *("job.", "data.cache_dir", "data.offline_dataset", "checkpoint.resume", "training.dtype"),
)
"""Starts of keys whose changes are not listed on resume; what `dtype` chose is compared apart."""


def run_identity(config: JobConfig) -> dict[str, dict]:
    """Returns what must be equal in a run and a checkpoint that it resumes from: what determines
    the meaning of the tensors and of the position in the data. A checkpoint's also has its corpus.
    """
    return {
        "model": _without_resumable_keys(config.model),
        "method": _without_resumable_keys(config.method),
        "optimizer": {"name": config.optimizer.name},
        "data": config.data.identity(),
        "training": config.training.model_dump(
            include={"global_batch_size", "frozen_dtype", "trained_dtype"}
        ),
        "job": {"seed": config.job.seed},
    }


def read_run(
    checkpoint: Path, config: JobConfig, identity: Mapping[str, object]
) -> tuple[CheckpointMetadata, TrainState]:
    """Reads a checkpoint's metadata and training state. Raises a CheckpointError if the checkpoint
    does not belong to the run of this identity, or its state is damaged."""
    metadata = read_metadata(checkpoint)
    check_same_run(completed_identity(metadata.identity, config), identity)
    try:
        return metadata, TypeAdapter(TrainState).validate_json(json.dumps(metadata.train_state))
    except ValidationError as error:
        raise CheckpointError(
            f"{checkpoint}: train_state in metadata.json is damaged, or of a newer version of "
            f"switchtitan ({explain(error)})"
        ) from error


def completed_identity(
    saved: Mapping[str, Mapping[str, object]], config: JobConfig
) -> dict[str, dict[str, object]]:
    """Returns a checkpoint's identity without its corpus, which is looked for by content, and with
    the defaults of keys that are newer than it."""
    completed = {name: dict(saved[name]) for name in saved if name != "corpus"}
    completed["training"].setdefault("trained_dtype", "float32")
    for name in completed.keys() & {"model", "method"}:
        defaults = _without_resumable_keys(type(getattr(config, name)).model_construct())
        completed[name] = defaults | completed[name]
    return completed


def changes_since(saved_toml: str, config: JobConfig, step: int) -> list[str]:
    """Returns what differs from a saved configuration, as `key: old -> new`, and how a run with the
    new one from the start would have differed until `step`. A key that is newer than the saved
    configuration had its default."""
    saved, now = (parse_toml(of, "configuration") for of in (saved_toml, resolved_toml(config)))
    changes = _changed_keys(flatten(saved), flatten(now), config)
    given = {key: value for key, value in saved["lr_schedule"].items() if value != NONE}
    schedules = LRScheduleConfig(**given), config.lr_schedule
    lengths = saved["training"]["steps"], config.training.steps
    old, new = (build_lr_schedule(*each)(step - 1) for each in zip(schedules, lengths, strict=True))
    if old != new:
        changes.append(f"share of the peak learning rate in step {step}: {old:.3g} -> {new:.3g}")
    if lengths[0] != lengths[1] and config.method.depends_on_length():
        changes.append(f"{config.method.name} depends on training.steps in every step")
    return changes


def _changed_keys(
    before: dict[str, object], now: dict[str, object], config: JobConfig
) -> list[str]:
    before = {
        key: now[key]
        for key in now
        if (place := key.split("."))[1:] and getattr(config, place[0]).is_default(place[1])
    } | before
    return [
        f"{key}: {toml_value(before.get(key, 'default'))} -> {toml_value(now[key])}"
        for key in now
        if before.get(key) != now[key] and not key.startswith(_UNLISTED_KEYS)
    ]


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
        "corpus": {"name": corpus.index.name, "fingerprint": corpus.fingerprint},
        "num_parameters": count_parameters(model),
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
    logger.info("corpus %s: %s", corpus.index.name, corpus.description)
    world, (replicate, shard) = stepper.world, stepper.world.mesh.shape
    layout = f"replicate {replicate} x shard {shard}"
    logger.info("%d rank(s) on %s: %s", world.size, device_name(world.device), layout)
    logger.info("compute dtype: %s", compute_dtype)
    start = f"starting a new run in {config.job.output_dir}"
    logger.info("%s", start if checkpoint is None else f"resuming from {checkpoint}")
    if changes and world.is_main:
        trains_longer = all(change.startswith("training.steps: ") for change in changes)
        level = logging.INFO if trains_longer else logging.WARNING
        logger.log(level, "changed since that checkpoint: %s", "; ".join(changes))
    if any(is_on for _, is_on in config.compile) and stepper.state.step < config.training.steps:
        logger.info(
            "compiling: the first step can take minutes; later runs use the cache; "
            "speed and ETA are measured from the second step"
        )


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts the values of trainable parameters, frozen parameters and buffers over all ranks."""
    parameters = list(model.parameters())
    return {
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "frozen": sum(num_values(p) for p in parameters if not p.requires_grad),
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
    }
