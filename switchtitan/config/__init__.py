"""Typed, validated, frozen configuration sections, read from TOML and the command line."""

from switchtitan.config.errors import (
    CheckpointError,
    ConfigError,
    CorpusError,
    EnvironmentMismatchError,
    RanksDisagreeError,
    UserError,
    exit_for,
)
from switchtitan.config.section import Section

__all__ = [
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "EnvironmentMismatchError",
    "RanksDisagreeError",
    "Section",
    "UserError",
    "exit_for",
]
