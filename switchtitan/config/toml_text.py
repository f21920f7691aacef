"""Sections and values as TOML text."""

import json
import math
from collections.abc import Mapping
from pathlib import PurePath

from pydantic import ValidationError

from switchtitan.config.section import Section

NONE_TEXT = "none"
"""TOML has no null: this string stands for None, in files and on the command line, where a key may be None."""


def resolved_toml(config: Section) -> str:
    """The whole configuration, defaults included, as TOML that reads back to an equal configuration.

    A default that must not be set, since it has no effect beside the other keys, stands there as a comment.
    """
    return "\n".join(_table_lines(config, ())).strip() + "\n"


def toml_value(value: object) -> str:
    """One value as it would stand in a TOML file; what TOML cannot say is shown as Python would."""
    if value is None:
        return f'"{NONE_TEXT}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, (str, PurePath)):
        # JSON's string escapes are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    return str(value)


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """A nested table's values by dotted key, e.g. `training.steps`; tuples become lists."""
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
    """All keys, without those that it would be refused to set to their default, as having no effect."""
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


def _float_text(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
