"""Loads configurations for uses of trained models."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from switchtitan.checkpoint import CheckpointMetadata
from switchtitan.config.toml_files import parse_toml
from switchtitan.config.toml_text import flatten
from switchtitan.distributed.world import device_type
from switchtitan.job.checks import evaluation_checks
from switchtitan.job.config import JobConfig, parse_arguments


def saved_config(metadata: CheckpointMetadata) -> JobConfig:
    """Returns the configuration of the run that saved a checkpoint.

    Raises:
        ConfigError: if this version does not accept it.
    """
    saved = flatten(parse_toml(metadata.config, "the saved configuration"))
    # Before the key existed, held-out documents were not cut.
    is_older = "data.max_document_share" not in saved
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(metadata.config, encoding="utf-8", errors="replace")
        return load_for_evaluation(
            str(file), ["--data.max_document_share", "none"] if is_older else []
        )


def load_for_evaluation(file: str, overrides: Sequence[str] = ()) -> JobConfig:
    """Loads a configuration and checks only what an evaluation needs.

    Its model has kernels that this machine has; see `ModelConfig.on_any_machine`.

    Raises:
        ConfigError: if it is invalid.
    """
    config = parse_arguments(
        ["--config", file, *overrides], checks=evaluation_checks(device_type())
    )
    return config.model_copy(update={"model": config.model.on_any_machine()})
