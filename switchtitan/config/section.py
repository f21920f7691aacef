"""The base class of every configuration section, and the error of keys without effect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class VoidKey:
    """A key that has no effect because of other keys."""

    key: str
    """Within its section in a `VoidKeyError`, e.g. `decay_ratio`; else with it, e.g.
    `method.decay_ratio`."""
    because: tuple[str, ...]
    """The keys whose values leave it no effect, written in the same way."""
    problem: str
    """The error message."""

    def __str__(self) -> str:
        return self.problem


class VoidKeyError(ValueError):
    """Keys of a section have no effect, which its other keys decide.

    Args:
        void: the keys.
        others: other mistakes of the section.
    """

    def __init__(self, void: Sequence[VoidKey], others: Sequence[str] = ()) -> None:
        super().__init__("; ".join(dict.fromkeys([*others, *(key.problem for key in void)])))
        self.void = tuple(void)


class Section(BaseModel):
    """A frozen, strict section of the configuration, e.g. `[training]`.

    Each field has a docstring with its unit and allowed values, which `--help-all` shows.
    """

    # Defaults are not validated: sections are read in strict JSON mode, which rejects a `Path`.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    resumable_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that do not affect results; they may change on resume."""

    @classmethod
    def implied_by(cls, key: str, value: object) -> Mapping[str, object]:
        """The keys of this section that a value of `key` sets, unless they are given themselves."""
        return {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        for field in cls.model_fields.values():
            # `--help-all` wraps lines itself.
            if field.description:
                field.description = " ".join(field.description.split())


class NamedSection(Section):
    """A section whose key `name` chooses its class, e.g. `[method] name = "lora"`."""

    name: str
    """A subclass allows one value, e.g. `name: Literal["lora"] = "lora"`."""
