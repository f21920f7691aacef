"""Atomic checkpoints: save, find, verify, load on any number of ranks, prune."""

from switchtitan.checkpoint.checkpointer import Checkpointer
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.find import (
    check_given_paths,
    check_output_folder,
    check_same_run,
    find_all,
    find_checkpoint,
    find_given,
    find_latest,
)
from switchtitan.checkpoint.load import SavedTensors, load_tensors_
from switchtitan.checkpoint.metadata import CheckpointMetadata, read_metadata

__all__ = [
    "CheckpointConfig",
    "CheckpointMetadata",
    "Checkpointer",
    "SavedTensors",
    "check_given_paths",
    "check_output_folder",
    "check_same_run",
    "find_all",
    "find_checkpoint",
    "find_given",
    "find_latest",
    "load_tensors_",
    "read_metadata",
]
