"""The values that a section's field accepts: tests, parsing of arguments, and descriptions."""

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import tomli
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from switchtitan.config.section import Section
from switchtitan.config.toml_text import NONE_STRING, toml_value

KeyPath = tuple[str, ...]
"""Path of a key, e.g. ("training", "steps"); an index stands for an item of a list of tables."""

_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    Path: "a path",
}
_BOUNDS = {
    annotated_types.Gt: ("gt", "> {}"),
    annotated_types.Ge: ("ge", ">= {}"),
    annotated_types.Lt: ("lt", "< {}"),
    annotated_types.Le: ("le", "<= {}"),
    annotated_types.MultipleOf: ("multiple_of", "a multiple of {}"),
    annotated_types.MinLen: ("min_length", "of length >= {}"),
    annotated_types.MaxLen: ("max_length", "of length <= {}"),
}


def is_section_type(annotation: object) -> bool:
    """Whether a field of this type is a table."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def item_section_type(annotation: object) -> type[Section] | None:
    """Return the class of the tables in a list of tables, None for other types."""
    items = get_args(annotation) if get_origin(annotation) in (tuple, list) else ()
    return items[0] if items and is_section_type(items[0]) else None


def dotted_keys(sections: Mapping[str, type[Section]]) -> list[str]:
    """Return all keys of the sections as on the command line, e.g. `training.steps`."""
    keys = []
    for section, section_type in sections.items():
        for name, field in section_type.model_fields.items():
            inner: Any = field.annotation
            below = dotted_keys({name: inner}) if is_section_type(inner) else [name]
            keys += [f"{section}.{key}" for key in below]
    return keys


def accepts(field: FieldInfo, value: object) -> bool:
    """Whether a value from TOML fits the field's type and bounds without a conversion."""
    try:
        bounded: Any = field.annotation
        for bound in field.metadata:
            bounded = Annotated[bounded, bound]
        TypeAdapter(bounded).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError:
        return False
    return True


def interpret(key: FieldInfo | None, words: Sequence[str]) -> object:
    """Parse the arguments of an override for a key.

    An argument is parsed as TOML (`8`, `true`, `["a", "b"]`), as a string without quotes, and as
    items separated by commas. Returns the first result that the key accepts. If it accepts none,
    returns the first result, which validation then rejects.
    """
    if len(words) > 1:
        readings: list[object] = [[_literal(word) for word in words], list(words)]
    else:
        word = words[0]
        items = [item.strip() for item in word.strip("[]").split(",")]
        readings = [_literal(word), word, [_literal(item) for item in items], items]
    if key is None:
        return readings[0]
    if (
        " ".join(words).lower() == NONE_STRING
        and admits_none(key)
        and NONE_STRING not in choices(key)
    ):
        return None
    return next((reading for reading in readings if accepts(key, reading)), readings[0])


def choices(field: FieldInfo) -> list[str]:
    """Return the strings among a field's allowed literal values."""
    return [choice for choice in _literals(field.annotation) if isinstance(choice, str)]


def admits_none(field: FieldInfo) -> bool:
    """Whether the field may be None."""
    return any(part is types.NoneType for part in _alternatives(field.annotation))


def describe(field: FieldInfo) -> str:
    """Describe what the field accepts, e.g. `an integer >= 1, or "none"`."""
    return _describe(field.annotation, field.metadata)


def _describe(annotation: object, metadata: Sequence[object]) -> str:
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        return _describe(annotation, [*metadata, *_flattened(more)])
    bounds = _bounds(metadata)
    alternatives = _alternatives(annotation)
    if len(alternatives) > 1:
        words = [_describe(part, []) for part in alternatives if part is not types.NoneType]
        optional = ', or "none"' if types.NoneType in alternatives else ""
        return " or ".join(words) + bounds + optional
    literals = _literals(annotation)
    if literals:
        return ("one of " if len(literals) > 1 else "") + ", ".join(map(toml_value, literals))
    items = get_args(annotation)
    if get_origin(annotation) in (tuple, list) and items:
        if get_origin(annotation) is list or items[-1] is Ellipsis:
            return f"a list of items, each {_describe(items[0], [])}" + bounds
        return f"a list of {len(items)} items, each {_describe(items[0], [])}"
    if get_origin(annotation) is dict and items:
        return f"a table of keys, each with {_describe(items[1], [])}"
    if is_section_type(annotation):
        return "a table"
    if annotation is Any:
        return "a value"
    return _NAMES.get(annotation, str(annotation)) + bounds  # type: ignore[call-overload]


def _literal(word: str) -> object:
    """Parse a word as a TOML or Python value; return it unchanged if it is neither."""
    if word in ("True", "False"):
        return word == "True"
    try:
        value = tomli.loads(f"value = {word}")["value"] if "\n" not in word else word
        # TOML has integers of 64 bits.
        return word if isinstance(value, int) and value.bit_length() > 63 else value
    except (ValueError, RecursionError):
        pass
    try:
        return float(word)  # `.5` and `1.` are not valid TOML
    except ValueError:
        return word


def _alternatives(annotation: object) -> list[object]:
    if get_origin(annotation) in (Union, types.UnionType):
        return list(get_args(annotation))
    return [annotation]


def _literals(annotation: object) -> list[object]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    parts = get_args(annotation) if get_origin(annotation) not in (tuple, list) else ()
    return [literal for part in parts for literal in _literals(part)]


def _flattened(metadata: Sequence[object]) -> list[object]:
    return [
        item
        for entry in metadata
        for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])
    ]


def _bounds(metadata: Sequence[object]) -> str:
    bounds = [
        template.format(getattr(entry, attribute))
        for entry in metadata
        for bound_type, (attribute, template) in _BOUNDS.items()
        if isinstance(entry, bound_type)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""
