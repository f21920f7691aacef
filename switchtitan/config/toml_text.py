"""Converts sections and values to TOML."""

import json
import math
from collections.abc import Mapping
from pathlib import PurePath

from pydantic import ValidationError

from switchtitan.config.section import Section

NONE_STRING = "none"
"""Stands for None in files and on the command line if the key may be None: TOML has no null."""


def resolved_toml(config: Section) -> str:
    """Return the full configuration, including defaults, as TOML that loads as an equal one.

    A default that must not be set, because the other keys leave it no effect, becomes a comment.
    """
    return "\n".join(_table_lines(config, ())).strip() + "\n"


def toml_value(value: object) -> str:
    """Return a value as in a TOML file, or as in Python if TOML has no such value."""
    if value is None:
        return f'"{NONE_STRING}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_toml(value)
    if isinstance(value, (str, PurePath)):
        # TOML's string escapes are those of JSON, except that TOML escapes DEL too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Section):
        # A table in a list: TOML has no null, and its keys without a value are optional.
        return toml_value(value.model_dump(exclude_none=True))
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    return str(value)


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return a nested table's values by dotted key, e.g. `training.steps`, with tuples as lists."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _table_lines(config: Section, path: tuple[str, ...]) -> list[str]:
    values = {name: getattr(config, name) for name in type(config).model_fields}
    sections = {name: value for name, value in values.items() if isinstance(value, Section)}
    active = _keys_to_set(config, values)
    lines = [
        f"{'' if name in active else '# '}{name} = {toml_value(value)}"
        for name, value in values.items()
        if name not in sections
    ]
    if path and lines:
        lines.insert(0, f"[{'.'.join(path)}]")
    for name, section in sections.items():
        lines += ["", *_table_lines(section, (*path, name))]
    return lines


def _keys_to_set(config: Section, values: Mapping[str, object]) -> set[str]:
    """Return all keys except those that must not be set, even to their defaults."""
    active = dict(values)
    if not _is_valid(config, active):
        active = {key: values[key] for key in values if key in config.model_fields_set}
        for key in values:
            if _is_valid(config, {**active, key: values[key]}):
                active[key] = values[key]
    return set(active)


def _is_valid(config: Section, values: Mapping[str, object]) -> bool:
    try:
        type(config).model_validate(values)
    except ValidationError:
        return False
    return True


def _float_toml(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
