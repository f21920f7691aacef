"""The base class of every configuration section."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, strict part of the configuration, e.g. `[training]`.

    Each field has a docstring with its unit and allowed values; `--help` shows it.
    """

    # Defaults are not validated: the strict JSON mode in which sections are read refuses a `Path` there.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    resumable_keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that do not affect results; they may change on resume."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        for field in cls.model_fields.values():
            # A docstring's line breaks are the source's; `--help` breaks lines where its columns end.
            field.description = " ".join(field.description.split()) if field.description else None


class NamedSection(Section):
    """A section whose key `name` chooses its class from a registry, e.g. `[method] name = "lora"`."""

    name: str
    """A subclass has one value here, e.g. `name: Literal["lora"] = "lora"`."""
