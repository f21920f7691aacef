"""Loads configurations for uses of trained models."""

import tempfile
from pathlib import Path

from switchtitan.checkpoint import CheckpointMetadata
from switchtitan.distributed.world import device_type
from switchtitan.job.checks import evaluation_checks
from switchtitan.job.config import JobConfig, parse_arguments


def saved_config(metadata: CheckpointMetadata) -> JobConfig:
    """Returns the configuration of the run that saved a checkpoint.

    Raises:
        ConfigError: if this version does not accept it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(metadata.config, encoding="utf-8", errors="replace")
        return load_for_evaluation(str(file))


def load_for_evaluation(file: str) -> JobConfig:
    """Loads a configuration and checks only what an evaluation needs.

    Raises:
        ConfigError: if it is invalid.
    """
    return parse_arguments(["--config", file], checks=evaluation_checks(device_type()))
