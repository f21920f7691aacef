"""Atomic checkpoints: save, find, verify, load on any number of ranks, prune."""

from switchtitan.checkpoint.checkpointer import Checkpointer, join_writers
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.find import (
    CHECKPOINTS_FOLDER,
    METADATA_FILE,
    CheckpointMetadata,
    check_given_paths,
    check_same_run,
    find_checkpoint,
    find_given,
    find_latest,
    list_step_folders,
    read_metadata,
    step_folder_name,
    step_of,
    verify,
)
from switchtitan.checkpoint.tensors import CheckpointTensors, SavedTensors, load_tensors_

__all__ = [
    "CHECKPOINTS_FOLDER",
    "METADATA_FILE",
    "CheckpointConfig",
    "CheckpointMetadata",
    "CheckpointTensors",
    "Checkpointer",
    "SavedTensors",
    "check_given_paths",
    "check_same_run",
    "find_checkpoint",
    "find_given",
    "find_latest",
    "join_writers",
    "list_step_folders",
    "load_tensors_",
    "read_metadata",
    "step_folder_name",
    "step_of",
    "verify",
]
