"""Loads a configuration from TOML files and overrides. Reports all mistakes in one message."""

import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import tomli
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
from switchtitan.config.shipped import FOLDER
from switchtitan.config.toml_text import NONE_STRING, flatten, toml_value
from switchtitan.config.void_keys import (
    drop_for_name,
    drop_implied,
    drop_void,
    print_note,
    void_keys,
)
from switchtitan.errors import ConfigError
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
        overrides=arguments.overrides,
        overrides_heading=overrides_heading,
        mistakes=list(arguments.mistakes),
    )
    expanded = expand(draft, expansions)
    _choose_classes(draft)
    _apply_overrides(draft)
    _drop_what_overrides_imply(draft)
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


@dataclass
class TomlFile:
    """The values of a TOML file, merged with those of its bases."""

    table: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """The file of each key and table; the last one if several have it."""


def read_with_bases(file: Path, types: SectionTypes, alone: Collection[KeyPath] = ()) -> TomlFile:
    """Read a TOML file and add the keys that it lacks from its `base`.

    `base` is a path relative to the file that has this key, or the name of a configuration that is
    installed with switchtitan. A base may have a base. Tables are merged key by key. A `[model]`,
    `[method]` or `[optimizer]` section whose `name` differs from the base's takes no keys from it.

    Args:
        alone: keys whose section takes no keys from a base either.

    Raises:
        ConfigError: if a file cannot be read, or is its own base.
    """
    chain: dict[Path, tuple[Path, dict[str, Any]]] = {}
    at = file
    while True:
        table = read_toml(at)
        chain[at.resolve()] = (at, table)
        base = table.pop("base", None)
        if base is None:
            break
        place = f"{at}: base = {toml_value(base)}"
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{place}: expected the path of a TOML file, relative to this one")
        at = at.parent / base
        if not at.is_file() and (FOLDER / base).is_file():
            at = FOLDER / base
        if not at.is_file():
            raise ConfigError(f"{place}: no such file{_neighbour_hint(at)}")
        if at.resolve() in chain:
            cycle = " -> ".join(str(path) for path, _ in chain.values())
            raise ConfigError(
                f"{place}: a file cannot be based on itself: {cycle} -> {at}; remove this line"
            )
    merged = TomlFile()
    for path, table in reversed(chain.values()):
        for section in types:
            above, below = table.get(section), merged.table.get(section)
            stands_alone = any(key in _as_table(above) for owner, key in alone if owner == section)
            if isinstance(types[section], Mapping) and (
                (stands_alone and below is not None) or _has_other_name(above, below)
            ):
                del merged.table[section]
                for key in [key for key in merged.origins if key[0] == section]:
                    del merged.origins[key]
        _merge(merged, table, (), str(path))
    return merged


def read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: if it is missing, cannot be read, or is not valid TOML.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: no such file{_neighbour_hint(file)}") from error
    except OSError as error:
        raise ConfigError(f"{file}: expected a readable file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: expected UTF-8 text, but byte {error.start} is not") from error
    except ValueError as error:
        raise ConfigError(f"{str(file)!r}: not a path: {error}") from error
    return parse_toml(text, str(file))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse a TOML document.

    Args:
        where: the document, for errors.

    Raises:
        ConfigError: if it is not valid TOML, or has an integer of more than 64 bits.
    """
    try:
        table = tomli.loads(text)
    # Python refuses integers of more than 4300 digits; nested lists exhaust its stack.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{where}: not valid TOML: {error}\n"
            "Write strings in quotes, lists in [brackets], and each key once under its [section]."
        ) from error
    for key, value in flatten(table).items():
        if not _fits_64_bits(value):
            raise ConfigError(f"{where}: {key}: expected an integer of at most 64 bits")
    return table


def _fits_64_bits(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_fits_64_bits, value))
    if isinstance(value, dict):
        return all(map(_fits_64_bits, value.values()))
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63


def _has_other_name(above: object, below: object) -> bool:
    if not isinstance(above, dict) or not isinstance(below, dict):
        return False
    return "name" in above and above["name"] != below.get("name", above["name"])


def _as_table(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _merge(into: TomlFile, table: Mapping[str, Any], path: KeyPath, file: str) -> None:
    """Merge `table`, found at `path` in `file`, into `into`, replacing values of the same keys."""
    target = into.table
    for name in path:
        target = target[name]
    for key, value in table.items():
        place = (*path, key)
        into.origins[place] = file
        if isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(into, value, place, file)
        else:
            target[key] = value


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


def _drop_what_overrides_imply(draft: Draft) -> None:
    for path in draft.overrides:
        value, section_type = draft.value(path), draft.chosen.get(path[0])
        if value and section_type is not None and len(path) == 2:
            drop_implied(draft, path, section_type.implied_by(path[1], value[0]))


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


def _neighbour_hint(file: Path) -> str:
    siblings = (
        [sibling.stem for sibling in file.parent.glob("*.toml")] if file.parent.is_dir() else []
    )
    near = nearest(file.stem, siblings)
    return f"; did you mean {file.parent / near}.toml?" if near else ""
