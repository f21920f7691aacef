"""Command lines that name several configurations to compare."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from switchtitan.config.load import Check
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments

_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"
_SIDE = re.compile(rf"(?P<file>.+?)(?::(?P<overrides>{_KEY}=.*))?", re.DOTALL)
_BETWEEN_OVERRIDES = re.compile(rf",(?={_KEY}=)")
_OVERRIDE = re.compile(rf"--({_KEY})(?:=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """`FILE[:section.key=value,...]`: a configuration file with overrides for this side."""

    file: str
    overrides: dict[str, list[str]]
    """Dotted key -> arguments of its value."""


def read_side(argument: str) -> Side:
    """Parses `FILE` or `FILE:section.key=value,section.key=value`; values may contain commas."""
    match = _SIDE.fullmatch(argument)
    assert match is not None, "an empty string names no file"
    pairs = [
        pair.partition("=") for pair in _BETWEEN_OVERRIDES.split(match["overrides"] or "") if pair
    ]
    return Side(match["file"], {key: [value] for key, _, value in pairs})


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates `--section.key value ...` and `--section.key=value` from a program's own arguments.

    Returns:
        The program's own arguments in order, and dotted key -> arguments of its value, which end at
        the next option.

    Raises:
        ConfigError: if a key is given twice.
    """
    own: list[str] = []
    overrides: dict[str, list[str]] = {}
    current = own
    for word in argv:
        match = _OVERRIDE.fullmatch(word)
        if match is not None:
            key, equals, value = word.removeprefix("--").partition("=")
            if key in overrides:
                raise ConfigError(f"--{key}: given twice; keep one")
            current = overrides[key] = []
            if equals:
                current.append(value)
                current = own
            continue
        if word.startswith("--"):
            current = own
        current.append(word)
    return own, overrides


def load_sides(
    arguments: Sequence[str],
    overrides: dict[str, list[str]],
    num_ranks: int | None = None,
    checks: Sequence[Check] | None = None,
) -> dict[str, JobConfig]:
    """Returns the configurations of all sides, by argument.

    Args:
        arguments: each `FILE[:section.key=value,...]`; a repeated one gets a number.
        overrides: for all sides, dotted key -> arguments of its value; a side's own come first.
        num_ranks: number of ranks to validate against; by default those that the launcher started.
        checks: see `parse_arguments`.

    Raises:
        ConfigError: with all errors of a side in one message.
    """
    configs: dict[str, JobConfig] = {}
    for index, argument in enumerate(arguments):
        side = read_side(argument)
        merged = overrides | side.overrides
        options = [word for key, words in merged.items() for word in (f"--{key}", *words)]
        name = f"{argument} ({index + 1})" if argument in configs else argument
        try:
            configs[name] = parse_arguments(
                ["--config", side.file, *options], num_ranks, checks=checks
            )
        except ConfigError as error:
            raise (ConfigError(f"{argument}: {error}") if side.overrides else error) from error
    return configs
