"""Atomic checkpoints: save, find, verify, load on any number of ranks, prune."""

from switchtitan.checkpoint.checkpointer import (
    CHECKPOINTS_FOLDER,
    METADATA_FILE,
    Checkpointer,
    CheckpointMetadata,
    check_same_run,
    find_checkpoint,
    find_given,
    join_writers,
    read_metadata,
    step_of,
)
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.tensors import CheckpointTensors, read_tensors, saved_tensors

__all__ = [
    "CHECKPOINTS_FOLDER",
    "METADATA_FILE",
    "CheckpointConfig",
    "CheckpointMetadata",
    "CheckpointTensors",
    "Checkpointer",
    "check_same_run",
    "find_checkpoint",
    "find_given",
    "join_writers",
    "read_metadata",
    "read_tensors",
    "saved_tensors",
    "step_of",
]
