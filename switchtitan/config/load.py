"""Loads a configuration from TOML files and overrides. Reports all mistakes in one message."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from switchtitan.config.command_line import Arguments
from switchtitan.config.expansions import Expand, expand, fill_in
from switchtitan.config.explain import (
    TOGETHER,
    Draft,
    Mistake,
    SectionTypes,
    explain,
    explain_unknown_section,
    nearest,
    raise_together,
)
from switchtitan.config.fields import (
    KeyPath,
    admits_none,
    choices,
    dotted_keys,
    interpret,
    is_section_type,
)
from switchtitan.config.section import Section, VoidKey
from switchtitan.config.toml_files import TomlFile, read_toml, read_with_bases
from switchtitan.config.toml_text import NONE_STRING
from switchtitan.config.void_keys import (
    drop_for_name,
    drop_implied,
    drop_void,
    print_note,
    void_keys,
)
from switchtitan.registry import Registry

ConfigT = TypeVar("ConfigT", bound=Section)

Check = Callable[..., Sequence[str | VoidKey]]
"""Checks that sections fit together; returns error messages, and keys without effect.

Its parameters have the names of the sections that it needs."""


def load_config(
    arguments: Arguments,
    file: Path | None,
    config_type: type[ConfigT],
    checks: Sequence[Check] = (),
    overrides_heading: str | None = None,
    expansions: Mapping[KeyPath, Expand] = MappingProxyType({}),
    say: Callable[[str], None] = print_note,
) -> ConfigT:
    """Read, override and validate a configuration that consists of sections.

    Keys of the file that the command line leaves without effect are dropped.

    Args:
        arguments: the split command line.
        file: the TOML file; None for an empty one.
        checks: each runs if all sections that it needs are valid.
        overrides_heading: for overrides that a program made: their heading in error messages.
        expansions: keys that stand for other keys of their section, e.g. ("model", "from_folder").
            Such a section takes no keys from a base file, and its other keys must agree.
        say: called with a note on each key that was dropped.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    types = section_types(config_type)
    given = TomlFile() if file is None else read_with_bases(file, types, expansions)
    draft = Draft(
        config_type,
        types,
        given.table,
        origins=given.origins,
        file=str(file),
        files=given.files,
        overrides=arguments.overrides,
        overrides_heading=overrides_heading,
        mistakes=list(arguments.mistakes),
    )
    expanded = expand(draft, expansions)
    _choose_classes(draft)
    _apply_overrides(draft)
    _drop_what_others_imply(draft)
    for path, keys in expanded.items():
        fill_in(draft, path, keys)
    for section in draft.table.keys() - types.keys():
        explain_unknown_section(draft, section)
    num_mistakes = len(draft.mistakes)
    while True:
        sections = {name: section for name in types for section in _validated(draft, name)}
        if not _check_together(draft, sections, checks):
            break
        del draft.mistakes[num_mistakes:]  # found again, if a dropped key was not their cause
    raise_together(draft.mistakes)
    for note in draft.notes:
        say(note)
    return config_type(**sections)


def load_table(file: Path, config_type: type[ConfigT]) -> ConfigT:
    """Read and validate a file as one section.

    Raises:
        ConfigError: with all mistakes in one message.
    """
    draft = Draft(config_type, {}, read_toml(file), file=str(file))
    try:
        return config_type.model_validate_json(_json(draft.table), strict=True)
    except ValidationError as error:
        explain(draft, error)
    raise_together(draft.mistakes)
    raise AssertionError("a validation error without a mistake")


def section_types(config_type: type[Section]) -> SectionTypes:
    """Return every section's class, or name -> class if a registry chooses it by `name`."""
    types: dict[str, Any] = {}
    for name, section in config_type.model_fields.items():
        registries = [entry for entry in section.metadata if isinstance(entry, Registry)]
        types[name] = registries[0].config_types() if registries else section.annotation
    return types


def _check_together(draft: Draft, sections: Mapping[str, Section], checks: Sequence[Check]) -> bool:
    """Add the mistakes that `checks` find; return whether keys were dropped instead."""
    has_dropped = False
    for check in checks:
        needed = [
            name for name in inspect.signature(check).parameters if name in draft.section_types
        ]
        if not all(name in sections for name in needed):
            continue
        for problem in check(**{name: sections[name] for name in needed}):
            if isinstance(problem, VoidKey) and drop_void(draft, problem):
                has_dropped = True
            else:
                draft.mistakes.append(Mistake(TOGETHER, str(problem)))
    return has_dropped


def _choose_classes(draft: Draft) -> None:
    """Find each section's class, by its `name` if a registry chooses it.

    Validation reports a wrong name.
    """
    for section, types in draft.section_types.items():
        if not isinstance(types, Mapping):
            draft.chosen[section] = types
            continue
        override = draft.overrides.get((section, "name"))
        former = draft.value((section, "name"))
        if override is not None and isinstance(draft.table.setdefault(section, {}), dict):
            draft.table[section]["name"] = override.words[0]
            if former != (override.words[0],):
                draft.changes[section, "name"] = override
        name = draft.value((section, "name"))
        if name and isinstance(name[0], str) and name[0] in types:
            draft.chosen[section] = types[name[0]]
            if override is not None and former:
                drop_for_name(draft, section, override, former[0], name[0])


def _apply_overrides(draft: Draft) -> None:
    """Replace the files' values with those of the command line.

    Validation reports unknown keys.
    """
    for path, override in draft.overrides.items():
        if len(path) == 1:
            _add_undotted_error(draft, path[0])
            continue
        target = draft.table
        for name in path[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                break  # validation reports this mistake of the file
        else:
            value = interpret(draft.field_at(path), override.words)
            if target.get(path[-1]) != value:
                draft.changes[path] = override
            target[path[-1]] = value


def _drop_what_others_imply(draft: Draft) -> None:
    for section, section_type in draft.chosen.items():
        given = draft.table.get(section)
        for key, value in list(given.items()) if isinstance(given, dict) else ():
            drop_implied(draft, (section, key), section_type.implied_by(key, value))


def _add_undotted_error(draft: Draft, option: str) -> None:
    options = dotted_keys(draft.chosen)
    home = next((key for key in options if key.rpartition(".")[2] == option), None) or nearest(
        option, options
    )
    hint = f"; did you mean --{home}?" if home else ""
    draft.add_error((option,), f"unknown option; expected --section.key value{hint}")


def _validated(draft: Draft, name: str) -> list[Section]:
    """Return the section `name` in a list, or an empty list after adding its mistakes."""
    given = draft.table.get(name, {})
    if not isinstance(given, dict):
        draft.add_error((name,), f"expected a table: [{name}] and its keys below it")
        return []
    if name in draft.chosen:
        _read_none(given, draft.chosen[name])
    section = draft.config_type.model_fields[name]
    annotation: Any = section.annotation
    for entry in section.metadata:
        annotation = Annotated[annotation, entry]
    # Built here, so that a union has all current rows of its registry.
    adapter: TypeAdapter[Section] = TypeAdapter(annotation)
    while True:
        try:
            return [adapter.validate_json(_json(given), strict=True)]
        except ValidationError as error:
            if not any(drop_void(draft, void) for void in void_keys(error, name)):
                explain(draft, error, (name,))
                return []


def _read_none(given: dict[str, Any], section_type: type[Section]) -> None:
    """Replace the string "none" by None for keys that may be None."""
    for key, value in given.items():
        key_field = section_type.model_fields.get(key)
        if key_field is None:
            continue
        if isinstance(value, dict) and is_section_type(key_field.annotation):
            _read_none(value, key_field.annotation)  # type: ignore[arg-type]
        elif (
            value == NONE_STRING
            and admits_none(key_field)
            and NONE_STRING not in choices(key_field)
        ):
            given[key] = None


def _json(table: Mapping[str, Any]) -> str:
    # No key accepts a TOML date or time, and none accepts what replaces it.
    return json.dumps(table, default=lambda value: {"date or time": str(value)})
