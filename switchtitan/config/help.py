"""`--help`, which describes the keys that most users set, and `--help-all`, which describes all."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from switchtitan.config.fields import KeyPath, choices, describe, dotted_keys, is_section_type
from switchtitan.config.section import Section
from switchtitan.config.toml_text import NONE_STRING, toml_value

_NAME_COLUMNS = 32
"""Width of the options in the short help."""


def print_short_help(
    sections: Mapping[str, Section],
    usage: str,
    introduction: str,
    common: Sequence[str],
    names: Mapping[str, Sequence[str]] | None = None,
    has_prefixes: bool = True,
) -> None:
    """Print the options, a sentence for each key in `common`, and the names of all keys, on stdout.

    Args:
        usage: the command, e.g. `switchtitan train [--config FILE]`.
        introduction: text above the keys.
        common: dotted keys in order; those that the sections do not have are left out.
        names: section -> allowed values of its key `name`, for sections that a registry chooses.
        has_prefixes: whether keys include their section, e.g. `--data.path` instead of `--path`.
    """
    columns = _columns()
    lines = [*_head(usage, introduction, has_prefixes), ""]
    own = {"--config FILE": "The TOML file.", "--help-all": "Describe every key."}
    for option, sentence in own.items():
        lines += _described(option, sentence, columns)
    lines += ["", "What most users set:"]
    for key in common:
        name, _, below = key.partition(".")
        field = type(sections[name]).model_fields.get(below) if name in sections else None
        if field is not None:
            sentence = _first_sentence(field.description or "")
            allowed = (names or {}).get(name, ()) if below == "name" else choices(field)
            if allowed:
                sentence += f" One of {', '.join(allowed)}."
            default = _shown(getattr(sections[name], below))
            option = f"--{key if has_prefixes else below}"
            lines += _described(option, f"{sentence} (default: {default})", columns)
    lines += ["", "All keys:"]
    for name, section in sections.items():
        keys = [key.partition(".")[2] for key in dotted_keys({name: type(section)})]
        prefix = f"[{name}] " if has_prefixes else ""
        lines += _wrapped(prefix + ", ".join(keys), 2, columns, 6 if has_prefixes else 2)
    print("\n".join(lines))


def print_full_help(
    sections: Mapping[str, Section],
    usage: str,
    introduction: str,
    names: Mapping[str, Sequence[str]] | None = None,
    has_prefixes: bool = True,
) -> None:
    """Print every key of the sections with its type, current value and description, on stdout.

    Args:
        usage, introduction, names, has_prefixes: as for `print_short_help`.
    """
    columns = _columns()
    lines = _head(usage, introduction, has_prefixes)
    for name, section in sections.items():
        lines += ["", f"[{name}]"]
        lines += _section_help(
            section, (name,) if has_prefixes else (), columns, (names or {}).get(name, ())
        )
    print("\n".join(lines))


def _head(usage: str, introduction: str, has_prefixes: bool) -> list[str]:
    keys = f"[--{'section.' if has_prefixes else ''}key value ...]"
    return [f"usage: {usage} {keys}", "", introduction.strip()]


def _columns() -> int:
    return max(40, min(100, shutil.get_terminal_size((80, 24)).columns))


def _described(option: str, sentence: str, columns: int) -> list[str]:
    """An option, and its sentence in a second column; below it if the option is too long."""
    start = f"  {option}".ljust(_NAME_COLUMNS)
    lines = textwrap.wrap(
        sentence, columns - _NAME_COLUMNS, break_on_hyphens=False, break_long_words=False
    )
    if len(start) > _NAME_COLUMNS:
        lines.insert(0, "")
    return [
        (start if number == 0 else " " * _NAME_COLUMNS) + line for number, line in enumerate(lines)
    ]


def _first_sentence(description: str) -> str:
    return re.split(r'; |\. (?=[A-Z"])', description)[0].rstrip(".") + "."


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
