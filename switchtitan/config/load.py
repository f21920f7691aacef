"""From a TOML file and command-line overrides to validated sections, every mistake reported at once."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from switchtitan.config.draft import Draft, SectionTypes
from switchtitan.config.explain import explain, explain_name, explain_unknown_section
from switchtitan.config.fields import admits_none, choices, dotted_keys, find_field, is_section_type
from switchtitan.config.mistakes import Mistake, Source, nearest, raise_together
from switchtitan.config.overrides import Arguments, interpret
from switchtitan.config.section import Section
from switchtitan.config.toml_text import NONE_TEXT
from switchtitan.errors import ConfigError

Check = Callable[..., list[str]]
"""A test of how sections fit together; its parameters are called like the sections that it looks at."""


def load_sections(
    arguments: Arguments, file: Path, section_types: SectionTypes, checks: Sequence[Check] = ()
) -> dict[str, Section]:
    """Reads, overrides and validates every section.

    Args:
        arguments: the command line, taken apart.
        file: the TOML file.
        section_types: what each section is validated by.
        checks: each runs when the sections that its parameters name are valid by themselves.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    draft = Draft(
        read_toml(file), section_types, overrides=arguments.overrides, mistakes=list(arguments.mistakes)
    )
    _choose_types(draft)
    _apply_overrides(draft)
    for section in draft.table.keys() - section_types.keys():
        explain_unknown_section(draft, section)
    sections: dict[str, Section] = {}
    for section, section_type in draft.chosen.items():
        given = draft.table.get(section, {})
        if not isinstance(given, dict):
            draft.refuse((section,), f"expected a table: [{section}] and its keys below it")
            continue
        _read_none(given, section_type)
        try:
            sections[section] = section_type.model_validate_json(
                json.dumps(given, default=_no_json), strict=True
            )
        except ValidationError as error:
            explain(draft, section, error)
    for check in checks:
        wanted = [name for name in inspect.signature(check).parameters if name in section_types]
        if all(name in sections for name in wanted):
            found = check(**{name: sections[name] for name in wanted})
            draft.mistakes += [Mistake(text, Source.TOGETHER) for text in found]
    raise_together(draft.mistakes, str(file))
    return sections


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: if it is missing, cannot be read, or is no TOML.
    """
    try:
        return tomli.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: there is no such file{_neighbour_hint(file)}") from error
    except OSError as error:
        raise ConfigError(f"{file}: expected a readable file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected UTF-8 text, but byte {error.start} is not") from error
    except tomli.TOMLDecodeError as error:
        raise ConfigError(
            f"{file}: not valid TOML: {error}\n"
            "A text stands in quotes, a list in [brackets], and a key once under its [section]."
        ) from error


def _choose_types(draft: Draft) -> None:
    """Finds each section's class, by its `name` where it has several."""
    for section, types in draft.section_types.items():
        if not isinstance(types, Mapping):
            draft.chosen[section] = types
            continue
        words = draft.overrides.get((section, "name"))
        if words is not None and isinstance(draft.table.setdefault(section, {}), dict):
            draft.table[section]["name"] = words[0]
        name = draft.value((section, "name"))
        if name and isinstance(name[0], str) and name[0] in types:
            draft.chosen[section] = types[name[0]]
        else:
            explain_name(draft, section, types)


def _apply_overrides(draft: Draft) -> None:
    """Puts the command line's values over the file's; keys that exist nowhere are left for the validation."""
    for path, words in draft.overrides.items():
        if len(path) == 1:
            _refuse_undotted(draft, path[0])
            continue
        section = draft.chosen.get(path[0])
        target = draft.table
        for name in path[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                break  # the file's mistake, which the validation reports
        else:
            target[path[-1]] = interpret(find_field(section, path[1:]) if section else None, words)


def _refuse_undotted(draft: Draft, option: str) -> None:
    options = dotted_keys(draft.chosen)
    home = next((key for key in options if key.rpartition(".")[2] == option), None) or nearest(
        option, options
    )
    hint = f"; did you mean --{home}?" if home else ""
    draft.refuse((option,), f"unknown option; expected --section.key value{hint}")


def _read_none(given: dict[str, Any], section_type: type[Section]) -> None:
    """Replaces the text that stands for None, where a key may be None."""
    for key, value in given.items():
        field = section_type.model_fields.get(key)
        if field is None:
            continue
        if isinstance(value, dict) and is_section_type(field.annotation):
            _read_none(value, field.annotation)  # type: ignore[arg-type]
        elif value == NONE_TEXT and admits_none(field) and NONE_TEXT not in choices(field):
            given[key] = None


def _no_json(value: object) -> dict[str, str]:
    """A TOML date or time, which no key takes, as something that no key takes either."""
    return {"date or time": str(value)}


def _neighbour_hint(file: Path) -> str:
    siblings = [sibling.stem for sibling in file.parent.glob("*.toml")] if file.parent.is_dir() else []
    near = nearest(file.stem, siblings)
    return f"; did you mean {file.parent / near}.toml?" if near else ""
