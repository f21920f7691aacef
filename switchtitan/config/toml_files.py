"""Reads TOML files, and merges each with the files that it names as its base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from switchtitan.config.explain import SectionTypes, nearest
from switchtitan.config.fields import KeyPath
from switchtitan.config.shipped import FOLDER
from switchtitan.config.toml_text import flatten, toml_value
from switchtitan.errors import ConfigError


@dataclass
class TomlFile:
    """The values of a TOML file, merged with those of its bases."""

    table: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """The file of each key and table; the one that is nearest if several have it."""
    files: list[str] = field(default_factory=list)
    """The file, its base, the base of that, and so on."""


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
    merged = TomlFile(files=[str(path) for path, _ in chain.values()])
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


def _neighbour_hint(file: Path) -> str:
    siblings = (
        [sibling.stem for sibling in file.parent.glob("*.toml")] if file.parent.is_dir() else []
    )
    near = nearest(file.stem, siblings)
    return f"; did you mean {file.parent / near}.toml?" if near else ""
