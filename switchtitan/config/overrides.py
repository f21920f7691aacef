"""Command-line arguments: the configuration file, `--help`, and `--section.key value` overrides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import tomli
from pydantic.fields import FieldInfo

from switchtitan.config.fields import accepts, admits_none, choices
from switchtitan.config.mistakes import Mistake, Source, nearest
from switchtitan.config.toml_text import NONE_TEXT

_OPTION = re.compile(r"--?[A-Za-z]")  # so that `-1` and `-1e-3` are values


@dataclass
class Arguments:
    """The command line, taken apart but not yet understood."""

    config_file: str | None = None
    wants_help: bool = False
    overrides: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """Path of the key -> the words that follow it."""
    mistakes: list[Mistake] = field(default_factory=list)


def split_arguments(argv: Sequence[str]) -> Arguments:
    """Takes apart `--config FILE`, `--help`, `--section.key value ...` and `--section.key=value`."""
    arguments = Arguments()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            arguments.wants_help = True
            continue
        if not word.startswith("--") or not _OPTION.match(word):
            arguments.mistakes.append(_mistake(word, "expected --section.key value"))
            continue
        option, equals, value = word.partition("=")
        values = [value] if equals else []
        while not equals and words and not _OPTION.match(words[0]):
            values.append(words.pop(0))
        _take_option(arguments, option, values)
    return arguments


def interpret(key: FieldInfo | None, words: Sequence[str]) -> object:
    """The value that the words of an override mean for a key of the given type.

    A word is read as TOML (`8`, `true`, `["a", "b"]`), as a bare text, and as items between commas; the
    first reading that the key admits is taken. Where it admits none, the plainest one is returned, for the
    validation to refuse.
    """
    if len(words) > 1:
        readings: list[object] = [[_literal(word) for word in words], list(words)]
    else:
        word = words[0]
        items = [item.strip() for item in word.strip("[]").split(",")]
        readings = [_literal(word), word, [_literal(item) for item in items], items]
    if key is None:
        return readings[0]
    if " ".join(words).lower() == NONE_TEXT and admits_none(key) and NONE_TEXT not in choices(key):
        return None
    return next((reading for reading in readings if accepts(key, reading)), readings[0])


def _take_option(arguments: Arguments, option: str, values: list[str]) -> None:
    path = tuple(option.removeprefix("--").replace("-", "_").split("."))
    near = nearest(option, ("--help", "--config"), likeness=0.8)
    if near not in (None, option):
        arguments.mistakes.append(_mistake(option, f"unknown option; did you mean {near}?"))
    elif not values:
        example = "FILE" if path == ("config",) else "VALUE"
        arguments.mistakes.append(_mistake(option, f"expected a value: {option} {example}"))
    elif path == ("config",):
        if len(values) > 1 or arguments.config_file is not None:
            arguments.mistakes.append(
                _mistake(f"{option} {' '.join(values)}", "expected one file, given once")
            )
        arguments.config_file = values[0]
    elif path in arguments.overrides:
        arguments.mistakes.append(_mistake(f"{option} {' '.join(values)}", "given twice; keep one"))
    else:
        arguments.overrides[path] = values


def _literal(word: str) -> object:
    """A word as TOML or Python would read it; itself where neither can."""
    if word in ("True", "False"):
        return word == "True"
    try:
        return tomli.loads(f"value = {word}")["value"] if "\n" not in word else word
    except tomli.TOMLDecodeError:
        pass
    try:
        return float(word)  # `.5` and `1.` are no TOML
    except ValueError:
        return word


def _mistake(place: str, problem: str) -> Mistake:
    return Mistake(f"{place}: {problem}", Source.COMMAND_LINE)
