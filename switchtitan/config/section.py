"""The base class of every configuration section."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict section of the configuration, e.g. `[training]`.

    Each field has a docstring with its unit and allowed values, which `--help-all` shows.
    """

    # Defaults are not validated: sections are read in strict JSON mode, which rejects a `Path`.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    resumable_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that do not affect results; they may change on resume."""

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
