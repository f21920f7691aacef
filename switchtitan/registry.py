"""Named components: what a name in the configuration builds, and the class of the section that configures it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from switchtitan.config.explain import nearest
from switchtitan.config.section import NamedSection
from switchtitan.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=NamedSection)
Part = TypeVar("Part")


@dataclass(frozen=True)
class Component(Generic[ConfigT, Part]):
    """One row of a registry: the section's class and the factory that receives an instance of it first."""

    config_type: type[ConfigT]
    factory: Callable[..., Part]


class Registry(Generic[ConfigT, Part]):
    """A table from names to components of one kind.

    As an annotation, `Annotated[MethodConfig, METHODS]`, it makes a field of the configuration the union of its rows' section
    classes, discriminated by `name`.

    Args:
        kind: the section that chooses from this table, e.g. "method"; error messages name it.
        components: the rows.
    """

    def __init__(self, kind: str, components: Mapping[str, Component[Any, Part]]) -> None:
        self.kind = kind
        self._components: dict[str, Component[ConfigT, Part]] = {}
        for name, component in components.items():
            self.register(name, component)

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __getitem__(self, name: str) -> Component[ConfigT, Part]:
        """Return the component called `name`.

        Raises:
            ConfigError: if there is none; names the nearest one.
        """
        component = self._components.get(name)
        if component is None:
            near = nearest(name, self)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(
                f"[{self.kind}] name = {name!r}: expected one of {', '.join(sorted(self))}{hint}"
            )
        return component

    def register(self, name: str, component: Component[Any, Part]) -> None:
        """Add a row. Configurations parsed from now on may choose it.

        Raises:
            ValueError: if the name is taken, or is not the default of the section's key `name`.
        """
        if name in self._components:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        own_name = component.config_type.model_fields["name"].default
        if own_name != name:
            raise ValueError(
                f"{component.config_type.__name__}.name defaults to {own_name!r}; expected {name!r}"
            )
        self._components[name] = component

    @contextmanager
    def registered(self, name: str, component: Component[Any, Part]) -> Iterator[None]:
        """Add a row for the duration of a `with` block, e.g. in a test."""
        self.register(name, component)
        try:
            yield
        finally:
            del self._components[name]

    def config_types(self) -> dict[str, type[ConfigT]]:
        """The section's class of every row, by name."""
        return {name: component.config_type for name, component in self._components.items()}

    def completed(self, section: Mapping[str, object]) -> dict[str, object]:
        """Fill in defaults for keys added since the section was saved.

        Nothing is validated: a value that equals its default may be one that must not be given. A section with an unknown
        `name` is returned unchanged.
        """
        name = str(section.get("name"))
        if name not in self._components:
            return dict(section)
        defaults = self._components[name].config_type.model_construct(name=name)
        return {**defaults.model_dump(mode="json"), **section}

    def restore(self, section: Mapping[str, object]) -> ConfigT:
        """The section that plain values were saved from, perhaps before its class had all of today's keys.

        Raises:
            ConfigError: if this version of the class does not accept the values.
        """
        name = str(section.get("name"))
        config_type = self[name].config_type
        defaults = config_type.model_construct(name=name).model_dump(mode="json")
        # A saved section names all keys, and some may not be given at all next to others.
        given = {key: value for key, value in section.items() if defaults.get(key, value) != value}
        given |= {key: value for key, value in section.items() if key not in defaults}
        try:
            return config_type.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"[{self.kind}] {name!r}: {error}") from error

    def comparable(self, section: Mapping[str, object]) -> dict[str, object]:
        """As `completed`, without `resumable_keys`."""
        component = self._components.get(str(section.get("name")))
        resumable_keys = frozenset() if component is None else component.config_type.resumable_keys
        return {
            key: value
            for key, value in self.completed(section).items()
            if key not in resumable_keys
        }

    def build(self, config: ConfigT, *args: object, **kwargs: object) -> Part:
        """Call the factory that `config.name` chooses with `config` and the given run-time values."""
        return self[config.name].factory(config, *args, **kwargs)

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        # JSON is what a file holds. In Python the value is a section already, perhaps of a row that came after this schema.
        rows = {name: handler.generate_schema(row) for name, row in self.config_types().items()}
        return core_schema.json_or_python_schema(
            json_schema=core_schema.tagged_union_schema(rows, discriminator="name"),
            python_schema=core_schema.is_instance_schema(source),
        )
