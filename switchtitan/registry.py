"""Named components: what a name in the configuration builds, and the type of the section that configures it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Generic, TypeVar

from pydantic import ValidationError

from switchtitan.config.section import Section
from switchtitan.errors import ConfigError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Component(Generic[Part]):
    """One row of a registry: the section's class and the factory that receives an instance of it first."""

    config_type: type[Section]
    factory: Callable[..., Part]


class Registry(Generic[Part]):
    """A table from names to components of one kind.

    Args:
        kind: the section that chooses from this table, e.g. "method"; it stands in error messages.
        components: the rows.
    """

    def __init__(self, kind: str, components: Mapping[str, Component[Part]]) -> None:
        self.kind = kind
        self._components = dict(components)

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __getitem__(self, name: str) -> Component[Part]:
        """Returns the component called `name`.

        Raises:
            ConfigError: if there is none; names the nearest one.
        """
        component = self._components.get(name)
        if component is None:
            nearest = get_close_matches(name, self._components, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(
                f"[{self.kind}] name = {name!r}: expected one of {', '.join(sorted(self))}{hint}"
            )
        return component

    def completed(self, section: Mapping[str, object]) -> dict[str, object]:
        """Fill in defaults for keys added since the section was saved.

        Nothing is validated: a value that equals its default may be one that must not be given. A section with an unknown
        `name` is returned unchanged.
        """
        component = self._components.get(str(section.get("name")))
        defaults = (
            {} if component is None else component.config_type.model_construct().model_dump(mode="json")
        )
        return {**defaults, **section}

    def restore(self, section: Mapping[str, object]) -> Section:
        """The section that plain values were saved from, perhaps before its class had all of today's keys.

        Raises:
            ConfigError: if this version of the class does not accept the values.
        """
        config_type = self[str(section.get("name"))].config_type
        defaults = config_type.model_construct().model_dump(mode="json")
        # A saved section names all keys, and some may not be given at all next to others.
        given = {key: value for key, value in section.items() if defaults.get(key, value) != value}
        given |= {key: value for key, value in section.items() if key not in defaults}
        try:
            return config_type.model_validate(given)
        except ValidationError as error:
            raise ConfigError(f"[{self.kind}] {section.get('name')!r}: {error}") from error

    def comparable(self, section: Mapping[str, object]) -> dict[str, object]:
        """As `completed`, without `resumable_keys`."""
        component = self._components.get(str(section.get("name")))
        resumable_keys = frozenset() if component is None else component.config_type.resumable_keys
        return {key: value for key, value in self.completed(section).items() if key not in resumable_keys}

    def build(self, config: Section, *args: object, **kwargs: object) -> Part:
        """Calls the factory that `config.name` chooses with `config` and the given run-time values."""
        name: str = config.name  # type: ignore[attr-defined]
        return self[name].factory(config, *args, **kwargs)
