"""Named components: a name in the configuration -> its factory and its section's class."""

from collections.abc import Callable, Iterator, Mapping
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
        rows: components by name, which is the default of the key `name` of their section.
    """

    def __init__(self, kind: str, rows: Mapping[str, Component[Any, Part]]) -> None:
        self.kind = kind
        self.rows: dict[str, Component[ConfigT, Part]] = dict(rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Component[ConfigT, Part]:
        """Return the component called `name`.

        Raises:
            ConfigError: if there is none.
        """
        if name not in self.rows:
            near = nearest(name, self)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ConfigError(
                f"[{self.kind}] name = {name!r}: expected one of {', '.join(sorted(self))}{hint}"
            )
        return self.rows[name]

    def config_types(self) -> dict[str, type[ConfigT]]:
        """Return every row's section class, by name."""
        return {name: component.config_type for name, component in self.rows.items()}

    def restore(self, section: Mapping[str, object]) -> ConfigT:
        """Build a section from plain values, which may be those of all its keys.

        Raises:
            ConfigError: if the section's class does not accept them.
        """
        name = str(section.get("name"))
        config_type = self[name].config_type
        # Some keys must not be set, even to their defaults.
        defaults = config_type.model_construct(name=name).model_dump(mode="json")
        given = {
            key: value
            for key, value in section.items()
            if key not in defaults or value != defaults[key]
        }
        try:
            return config_type.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"[{self.kind}] {name!r}: {error}") from error

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
