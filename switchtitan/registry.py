"""Sections of the configuration, and tables of components that a section chooses by name."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from switchtitan.errors import ConfigError

NONE = "none"
"""Stands for None in files and on the command line: TOML has no null."""
UNKNOWN = "unknown key"
"""What is wrong with a key that its section lacks."""


class Section(BaseModel):
    """A frozen, strict section of the configuration, e.g. `[training]`.

    Each field has a docstring with its unit and allowed values; help shows its first sentence.
    """

    # Defaults are not validated: sections are read in strict JSON mode, which rejects a `Path`.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    resumable_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that do not affect results; they may change on resume."""
    expansions: ClassVar[Mapping[tuple[str, ...], Callable[[str], Mapping[str, object]]]] = {}
    """Of all sections together: path of a key -> what returns the keys of its section that its
    value stands for, or raises a ConfigError. Other keys must not contradict those."""
    former_defaults: ClassVar[Mapping[str, object]] = {}
    """Keys whose default has changed, and what it was: checksums of finished runs rest on it."""

    def without_effect(self) -> list[str]:
        """Returns messages such as `min_factor = 0.2 has no effect with decay = "constant"`."""
        return []

    def is_default(self, key: str) -> bool:
        """Returns whether a key has its default value."""
        default = type(self).model_fields[key].get_default(call_default_factory=True)
        return bool(getattr(self, key) == default)


def toml_value(value: object) -> str:
    """Returns a value as in a TOML file, or as in Python if TOML has no such value."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, PurePath)):
        # TOML's string escapes are those of JSON, except that TOML escapes DEL too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Section):
        # A table in a list: its keys without a value are optional.
        return toml_value(value.model_dump(exclude_none=True))
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {toml_value(item)}' for key, item in value.items())} }}"
    return str(value)


def explain(error: Exception) -> str:
    """Returns an error in one line: of pydantic's, each key with its value and what is wrong."""
    if not isinstance(error, ValidationError):
        return str(error)
    parts = (f"{key}{given}: {why}".removeprefix(": ") for key, given, why in mistakes(error))
    return "; ".join(parts)


def mistakes(error: ValidationError) -> list[tuple[str, str, str]]:
    """Returns key (empty if it concerns several), place in it with its value, and what is wrong."""
    found: dict[tuple[str, str], list[str]] = {}
    for detail in error.errors():
        key, *rest = map(str, detail["loc"] or [""])
        # Steps into a list begin with a number; others are the branches of a union.
        steps = rest[next((at for at, step in enumerate(rest) if step.isdecimal()), len(rest)) :]
        place = "".join(f"[{step}]" if step.isdecimal() else f".{step}" for step in steps)
        problem = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        fixed = {"missing": "missing", "extra_forbidden": UNKNOWN}
        problem = fixed.get(detail["type"], problem)
        value = toml_value(detail["input"])
        if key and detail["type"] != "missing" and len(value) <= 100:
            place += f" = {value}"
        found.setdefault((key, place), []).append(problem)
    return [(*where, " or ".join(dict.fromkeys(problems))) for where, problems in found.items()]


def is_installed(package: str) -> bool:
    """Returns whether a package can be imported."""
    spec = find_spec(package)
    # A folder of this name in the working directory has no origin: wandb writes one.
    return spec is not None and spec.origin is not None


def needs_package(place: str, package: str) -> str:
    """Returns the message that what `place` chooses needs the extra of this name."""
    install = f"pip install '.[{package}]'"
    return f"{place}: needs the package {package}; run {install} in the checkout, or choose another"


class NamedSection(Section):
    """A section whose key `name` chooses its class, e.g. `[method] name = "lora"`."""

    name: str
    """A subclass allows one value, e.g. `name: Literal["lora"] = "lora"`."""


ConfigT = TypeVar("ConfigT", bound=NamedSection)
Part = TypeVar("Part")


@dataclass(frozen=True)
class Component(Generic[ConfigT, Part]):
    """One row of a registry: a section's class, and a factory whose first argument is a section."""

    config_type: type[ConfigT]
    factory: Callable[..., Part]


class Registry(Generic[ConfigT, Part]):
    """A table from names to components of one kind.

    `Annotated[MethodConfig, METHODS]` makes a field of the configuration a section of one of its
    rows' classes, chosen by the key `name`.

    Args:
        kind: the section that chooses from this table, e.g. "method".
        rows: components by name, which is the default of the key `name` of their section.
    """

    def __init__(self, kind: str, rows: Mapping[str, Component[Any, Part]]) -> None:
        self.kind = kind
        self.rows: dict[str, Component[ConfigT, Part]] = dict(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def config_types(self) -> dict[str, type[ConfigT]]:
        """Returns the class of every row's section, by name."""
        return {name: component.config_type for name, component in self.rows.items()}

    def restore(self, section: Mapping[str, object]) -> ConfigT:
        """Builds a section from plain values; a `ConfigError` if no class accepts them."""
        name = str(section.get("name"))
        if name not in self.rows:
            expected = ", ".join(sorted(self))
            raise ConfigError(f"[{self.kind}] name = {name!r}: expected one of {expected}")
        try:
            return self.rows[name].config_type.model_validate(section)
        except ValidationError as error:
            raise ConfigError(f"[{self.kind}] {name!r}: {explain(error)}") from error

    def build(self, config: ConfigT, *args: object, **kwargs: object) -> Part:
        """Calls the factory of `config.name` with `config` and the given run-time values."""
        return self.rows[config.name].factory(config, *args, **kwargs)

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        # The loader validates the section: rows can be registered after this schema was built.
        return core_schema.is_instance_schema(source)
