"""Command lines that name several configurations to put side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig, parse_arguments

_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"
_SIDE = re.compile(rf"(?P<file>.+?)(?::(?P<overrides>{_KEY}=.*))?", re.DOTALL)
_BETWEEN_OVERRIDES = re.compile(rf",(?={_KEY}=)")
_OVERRIDE = re.compile(rf"--({_KEY})(?:=.*)?", re.DOTALL)


@dataclass(frozen=True)
class Side:
    """`FILE[:section.key=value,...]`: a configuration file, and what is different on this side."""

    file: str
    overrides: dict[str, list[str]]
    """Dotted key -> the words of its value."""


def read_side(text: str) -> Side:
    """Takes apart `FILE` or `FILE:section.key=value,section.key=value`. A comma within a value
    stays in it."""
    match = _SIDE.fullmatch(text)
    assert match is not None, "an empty text is no file"
    pairs = [
        pair.partition("=") for pair in _BETWEEN_OVERRIDES.split(match["overrides"] or "") if pair
    ]
    return Side(match["file"], {key: [value] for key, _, value in pairs})


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates `--section.key value ...` and `--section.key=value` from the words that belong to a
    program itself.

    Returns:
        The other words in order, and dotted key -> words of its value, which end at the next
        option.

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
    texts: Sequence[str], overrides: dict[str, list[str]], num_ranks: int | None = None
) -> dict[str, JobConfig]:
    """The configurations of all sides, by what was given for them.

    Args:
        texts: each `FILE[:section.key=value,...]`. The same one twice gets a number: both should
            measure the same.
        overrides: for all sides, dotted key -> words of its value; a side's own go over them.
        num_ranks: that the configurations must fit; by default those that the launcher started.

    Raises:
        ConfigError: with all mistakes of a side in one message.
    """
    configs: dict[str, JobConfig] = {}
    for index, text in enumerate(texts):
        side = read_side(text)
        merged = overrides | side.overrides
        options = [word for key, words in merged.items() for word in (f"--{key}", *words)]
        name = f"{text} ({index + 1})" if text in configs else text
        try:
            configs[name] = parse_arguments(["--config", side.file, *options], num_ranks)
        except ConfigError as error:
            raise (ConfigError(f"{text}: {error}") if side.overrides else error) from error
    return configs
