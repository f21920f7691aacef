"""Named components: a name in the configuration -> its factory and its section's class."""

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
    """One row of a registry: a section's class, and a factory whose first argument is a section."""

    config_type: type[ConfigT]
    factory: Callable[..., Part]


class Registry(Generic[ConfigT, Part]):
    """A table from names to components of one kind.

    As an annotation, `Annotated[MethodConfig, METHODS]`, it makes a field of the configuration the
    union of its rows' section classes, discriminated by `name`.

    Args:
        kind: the section that chooses from this table, e.g. "method". Error messages name it.
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
            ConfigError: if there is none.
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
        """Add a row, for configurations parsed later.

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
        """Return every row's section class, by name."""
        return {name: component.config_type for name, component in self._components.items()}

    def completed(self, section: Mapping[str, object]) -> dict[str, object]:
        """Fill in defaults for keys added since the section was saved.

        Does not validate: some keys must not be set even to their defaults. A section with an
        unknown `name` is returned unchanged.
        """
        name = str(section.get("name"))
        if name not in self._components:
            return dict(section)
        defaults = self._components[name].config_type.model_construct(name=name)
        return {**defaults.model_dump(mode="json"), **section}

    def restore(self, section: Mapping[str, object]) -> ConfigT:
        """Build the section from its saved plain values.

        Keys added since it was saved get their defaults.

        Raises:
            ConfigError: if this version of the class does not accept the values.
        """
        name = str(section.get("name"))
        config_type = self[name].config_type
        defaults = config_type.model_construct(name=name).model_dump(mode="json")
        # A saved section contains all keys. Some must not be set, even to their defaults.
        given = {key: value for key, value in section.items() if defaults.get(key, value) != value}
        given |= {key: value for key, value in section.items() if key not in defaults}
        try:
            return config_type.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"[{self.kind}] {name!r}: {error}") from error

    def comparable(self, section: Mapping[str, object]) -> dict[str, object]:
        """Return `completed(section)` without `resumable_keys`."""
        component = self._components.get(str(section.get("name")))
        resumable_keys = frozenset() if component is None else component.config_type.resumable_keys
        return {
            key: value
            for key, value in self.completed(section).items()
            if key not in resumable_keys
        }

    def build(self, config: ConfigT, *args: object, **kwargs: object) -> Part:
        """Call the factory of `config.name` with `config` and the given run-time values."""
        return self[config.name].factory(config, *args, **kwargs)

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        # A file is validated as JSON. A Python value already is a section, perhaps of a row that
        # was registered after this schema was built.
        rows = {name: handler.generate_schema(row) for name, row in self.config_types().items()}
        return core_schema.json_or_python_schema(
            json_schema=core_schema.tagged_union_schema(rows, discriminator="name"),
            python_schema=core_schema.is_instance_schema(source),
        )
