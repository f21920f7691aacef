"""Command lines that name several configurations to compare."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from switchtitan.config import raise_together, split_arguments
from switchtitan.errors import ConfigError
from switchtitan.job.checks import check
from switchtitan.job.config import JobConfig, parse_arguments, parse_unchecked

_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"
_SIDE = re.compile(rf"(?P<file>.+?)(?::(?P<overrides>{_KEY}=.*))?", re.DOTALL)
_BETWEEN_OVERRIDES = re.compile(rf",(?={_KEY}=)")


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


def overrides_of(words: Sequence[str]) -> dict[str, list[str]]:
    """Returns dotted key -> words of its value, of `--section.key value ...` and
    `--section.key=value`.

    Raises:
        ConfigError: for another option, a key that is given twice, or one without a value.
    """
    file, wants_help, overrides = split_arguments(words)
    unknown = [f"--{path[0]}" for path in overrides if len(path) == 1]
    if file is not None or wants_help or unknown:
        raise ConfigError(
            f"{' '.join(unknown) or ' '.join(words)}: unknown option; expected --section.key value"
        )
    return {".".join(path): given for path, given in overrides.items()}


def load_sides(
    arguments: Sequence[str],
    keys: Sequence[str],
    parse: Callable[[Sequence[str]], JobConfig] = parse_arguments,
) -> dict[str, JobConfig]:
    """Returns the configurations of all sides, by argument.

    Args:
        arguments: each `FILE[:section.key=value,...]`; a repeated one gets a number.
        keys: words `--section.key value ...` for all sides; a side's own keys come first.
        parse: reads a side's `--config FILE --section.key value ...`.

    Raises:
        ConfigError: with all errors of a side in one message.
    """
    overrides = overrides_of(keys)
    configs: dict[str, JobConfig] = {}
    for index, argument in enumerate(arguments):
        side = read_side(argument)
        merged = overrides | side.overrides
        options = [word for key, words in merged.items() for word in (f"--{key}", *words)]
        name = f"{argument} ({index + 1})" if argument in configs else argument
        try:
            configs[name] = parse(["--config", side.file, *options])
        except ConfigError as error:
            raise (ConfigError(f"{argument}: {error}") if side.overrides else error) from error
    return configs


def load_simulated_sides(
    arguments: Sequence[str], keys: Sequence[str], num_ranks: int
) -> dict[str, JobConfig]:
    """Returns `load_sides` for `num_ranks` ranks of another machine than this."""

    def parse(words: Sequence[str]) -> JobConfig:
        config = parse_unchecked(words)
        raise_together(check(config, num_ranks, device=None))
        return config

    return load_sides(arguments, keys, parse)
