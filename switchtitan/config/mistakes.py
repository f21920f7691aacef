"""One mistake in a configuration, and the message that reports all of them together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from switchtitan.config.toml_text import toml_value
from switchtitan.errors import ConfigError


class Source(Enum):
    """Where the user wrote what is wrong; the value heads its group in the message."""

    FILE = "in {file}:"
    COMMAND_LINE = "on the command line:"
    TOGETHER = "values that do not fit together:"


@dataclass(frozen=True)
class Mistake:
    """What was given where, and what was expected, e.g. `[training] steps = "9": expected a whole number`."""

    text: str
    source: Source


def toml_place(path: Sequence[str], *given: object) -> str:
    """A key as it stands in the file: `[section] key = value`; without a given value, `[section] key`."""
    if len(path) <= 1 and not given:
        return f"[{path[0]}]" if path else "the file"
    table = f"[{'.'.join(path[:-1])}] " if len(path) > 1 else ""
    return table + path[-1] + "".join(f" = {toml_value(value)}" for value in given)


def nearest(word: str, choices: Iterable[str], likeness: float = 0.6) -> str | None:
    """The choice that `word` most likely meant, or None where none is as like it (0 to 1, see `difflib`)."""
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = get_close_matches(word.lower(), by_lower_case, n=1, cutoff=likeness)
    return by_lower_case[matches[0]] if matches else None


def raise_together(mistakes: Sequence[Mistake], file: str) -> None:
    """Returns when there are no mistakes.

    Raises:
        ConfigError: with every mistake in one message, grouped by where it was made.
    """
    if not mistakes:
        return
    count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
    lines = [f"{count} in the configuration"]
    for source in Source:
        group = [mistake for mistake in mistakes if mistake.source is source]
        if group:
            lines.append(source.value.format(file=file))
            lines += [f"  {mistake.text}" for mistake in group]
    raise ConfigError("\n".join(lines))
