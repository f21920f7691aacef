"""The command line: the configuration file, `--help`, and `--section.key value` overrides."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from switchtitan.config.explain import COMMAND_LINE, Mistake, Override, nearest
from switchtitan.config.fields import KeyPath, describe, is_section_type
from switchtitan.config.section import Section
from switchtitan.config.toml_text import NONE_STRING, toml_value

_OPTION = re.compile(r"--?[A-Za-z]")
"""Start of an option; does not match the values `-1` and `-1e-3`."""


@dataclass
class Arguments:
    """The command line, split but not interpreted."""

    config_file: str | None = None
    wants_help: bool = False
    overrides: dict[KeyPath, Override] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)


def split_arguments(argv: Sequence[str], section: str | None = None) -> Arguments:
    """Split `--config FILE`, `--help`, `--section.key value ...` and `--section.key=value`.

    Args:
        section: keys of this section may be given without it, e.g. `--path` for `--data.path`.
    """
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
        _add_option(arguments, Override(option, values), section)
    return arguments


def positive_int(word: str) -> int:
    """Parse an integer of at least 1, as an argparse type."""
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected an integer >= 1")
    return number


def print_help(
    sections: Mapping[str, Section],
    usage: str,
    introduction: str,
    names: Mapping[str, Sequence[str]] | None = None,
    has_prefixes: bool = True,
) -> None:
    """Print every key of the sections with its type, current value and description, on stdout.

    Args:
        usage: the command, e.g. `switchtitan train [--config FILE]`.
        introduction: text above the keys.
        names: section -> allowed values of its key `name`, for sections that a registry chooses.
        has_prefixes: whether keys include their section, e.g. `--data.path` instead of `--path`.
    """
    columns = max(40, min(100, shutil.get_terminal_size((80, 24)).columns))
    print(
        f"usage: {usage} [--{'section.' if has_prefixes else ''}key value ...]\n\n"
        f"{introduction.strip()}"
    )
    for name, section in sections.items():
        lines = _section_help(
            section, (name,) if has_prefixes else (), columns, (names or {}).get(name, ())
        )
        print("\n".join(["", f"[{name}]", *lines]))


def _section_help(section: Section, path: KeyPath, columns: int, names: Sequence[str]) -> list[str]:
    lines = _wrapped(_summary(type(section)), 2, columns, 2)
    for key, key_field in type(section).model_fields.items():
        value = getattr(section, key)
        if is_section_type(key_field.annotation):
            lines += _section_help(value, (*path, key), columns, ())
            continue
        lines += _wrapped(f"--{'.'.join((*path, key))} (default: {_shown(value)})", 2, columns, 6)
        accepted = describe(key_field)
        if key == "name" and len(names) > 1:
            accepted = f"one of {', '.join(map(toml_value, names))}"
        lines += _wrapped(f"{_capitalized(accepted)}. {key_field.description or ''}", 6, columns, 6)
    return lines


def _summary(section_type: type[Section]) -> str:
    """Return the class's docstring without the section's name at its start."""
    docstring = " ".join((section_type.__doc__ or "").split())
    return _capitalized(re.sub(r"^`\[[^`]*`[:.]? ?", "", docstring))


def _capitalized(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _shown(value: object) -> str:
    """Return the value as a user types it on the command line."""
    if value is None:
        return NONE_STRING
    return str(value) if isinstance(value, (str, PurePath)) else toml_value(value)


def _wrapped(text: str, indent: int, columns: int, hanging: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=" " * indent,
        subsequent_indent=" " * hanging,
        break_on_hyphens=False,
    )


def _add_option(arguments: Arguments, given: Override, section: str | None) -> None:
    path = tuple(given.option.removeprefix("--").replace("-", "_").split("."))
    near = nearest(given.option, ("--help", "--config"), cutoff=0.8)
    if near not in (None, given.option):
        arguments.mistakes.append(_mistake(given.option, f"unknown option; did you mean {near}?"))
    elif not given.words:
        example = "FILE" if path == ("config",) else "VALUE"
        arguments.mistakes.append(
            _mistake(given.option, f"expected a value; write {given.option} {example}")
        )
    elif path == ("config",):
        if len(given.words) > 1 or arguments.config_file is not None:
            arguments.mistakes.append(_mistake(str(given), "expected one file, given once"))
        arguments.config_file = given.words[0]
    else:
        if section is not None and path[0] != section:
            path = (section, *path)
        if path in arguments.overrides:
            arguments.mistakes.append(_mistake(str(given), "given twice; keep one"))
        arguments.overrides[path] = given


def _mistake(place: str, problem: str) -> Mistake:
    return Mistake(COMMAND_LINE, f"{place}: {problem}")
