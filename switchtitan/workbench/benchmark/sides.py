"""Command lines that name several configurations to compare."""

import re
from collections.abc import Callable, Sequence

from switchtitan.errors import ConfigError
from switchtitan.job.checks import check
from switchtitan.job.config import JobConfig, parse_arguments, parse_unchecked

_KEY = r"[A-Za-z_]\w*(?:\.\w+)+"
_SIDE = re.compile(rf"(?P<file>.+?)(?::(?P<overrides>{_KEY}=.*))?", re.DOTALL)
_BETWEEN_OVERRIDES = re.compile(rf",(?={_KEY}=)")


def load_sides(
    arguments: Sequence[str],
    keys: Sequence[str],
    parse: Callable[[Sequence[str]], JobConfig] = parse_arguments,
) -> dict[str, JobConfig]:
    """Returns the configurations of all sides, by argument. Raises a ConfigError with all errors of
    a side in one message, also if a side and `keys` have a key in common.

    Args:
        arguments: each `FILE` or `FILE:section.key=value,section.key=value`, whose values may
            contain commas; a repeated one gets a number.
        keys: words `--section.key value ...` for all sides.
        parse: reads a side's `--config FILE --section.key value ...`.
    """
    configs: dict[str, JobConfig] = {}
    for index, argument in enumerate(arguments):
        match = _SIDE.fullmatch(argument)
        assert match is not None, "an empty string names no file"
        own = match["overrides"]
        words = [f"--{pair}" for pair in _BETWEEN_OVERRIDES.split(own)] if own else []
        name = f"{argument} ({index + 1})" if argument in configs else argument
        try:
            configs[name] = parse(["--config", match["file"], *words, *keys])
        except ConfigError as error:
            raise (ConfigError(f"{argument}: {error}") if own else error) from error
    return configs


def load_simulated_sides(
    arguments: Sequence[str], keys: Sequence[str], num_ranks: int
) -> dict[str, JobConfig]:
    """Returns `load_sides` for `num_ranks` ranks of another machine than this."""

    def parse(words: Sequence[str]) -> JobConfig:
        config = parse_unchecked(words)
        check(config, num_ranks, device=None)
        return config

    return load_sides(arguments, keys, parse)
