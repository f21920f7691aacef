"""Reads what a run starts from: a checkpoint's state, initial weights and the compute dtype."""

import json
import logging
from dataclasses import fields
from pathlib import Path

from pydantic import TypeAdapter
from torch import Tensor

from switchtitan.checkpoint import CheckpointMetadata, check_same_run, read_metadata
from switchtitan.distributed.dtype import ComputeDtype, agree_on_dtype
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError
from switchtitan.job.config import JobConfig
from switchtitan.training.describe import changed_keys, comparable_identity, compute_dtype_of
from switchtitan.training.step import TrainState

# `hub` is imported where it is used: most runs do not use it.

logger = logging.getLogger(__name__)


def read_state(checkpoint: Path, identity: dict, resolved: str) -> tuple[TrainState, list[str]]:
    """Read a checkpoint's training state, and list the keys that have changed since.

    Args:
        resolved: this run's configuration, see `resolved_toml`.

    Raises:
        CheckpointError: if the checkpoint belongs to another run.
    """
    metadata = read_metadata(checkpoint)
    check_same_run(comparable_identity(metadata.identity), identity)
    state = _saved_state(checkpoint, metadata)
    state.compute_dtype = compute_dtype_of(metadata)
    return state, changed_keys(metadata.config, resolved)


def _saved_state(checkpoint: Path, metadata: CheckpointMetadata) -> TrainState:
    saved = metadata.train_state
    unknown = saved.keys() - {field.name for field in fields(TrainState)}
    try:
        state = TypeAdapter(TrainState).validate_json(json.dumps(saved), strict=True)
        counts = (state.step, state.num_skipped, state.tokens_seen)
        if unknown or state.step != metadata.step or not 0 <= min(counts) <= max(counts) < 1 << 63:
            raise ValueError(f"unexpected keys {sorted(unknown)}, or counts {counts}")
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint}: train_state in metadata.json is damaged, or of a newer version of "
            f"switchtitan ({' '.join(str(error).split())})"
        ) from error
    return state


def read_warm_start(config: JobConfig) -> tuple[TrainState, dict[str, Tensor] | None]:
    """Return the state of a new run, and its initial weights; None for random weights.

    The state records which weights were read.

    Raises:
        CheckpointError: if the weights cannot be read, or belong to another model.
    """
    if config.checkpoint.initial_weights is None:
        return TrainState(), None
    from switchtitan.hub.initial_weights import fingerprint, read_initial_weights

    source, weights = read_initial_weights(Path(config.checkpoint.initial_weights), config.model)
    logger.info("initial weights: %s", source)
    if not config.method.keeps_initial_weights:
        logger.warning(
            "[method] name = %r starts from an approximation of the initial weights",
            config.method.name,
        )
    return TrainState(initial_weights=str(source), initial_fingerprint=fingerprint(source)), weights


def build_compute_dtype(
    config: JobConfig, world: World, state: TrainState, changes: list[str]
) -> ComputeDtype:
    """Choose the compute dtype and put it into `state`; append to `changes` if it differs.

    Args:
        state: contains the checkpoint's dtype if the run resumes.

    Raises:
        EnvironmentMismatchError: if the devices or the model do not support it.
    """
    saved = state.compute_dtype
    chosen = agree_on_dtype(config.training.dtype, world, saved)
    config.model.check_device(world.device.type, chosen.dtype)
    if saved not in (None, chosen.name):
        changes.append(f"compute dtype: {saved} -> {chosen.name}")
    state.compute_dtype = chosen.name
    return chosen
