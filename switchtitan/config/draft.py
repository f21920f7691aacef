"""A configuration on the way to being valid: what was given, and every mistake found in it so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from switchtitan.config.fields import is_section_type
from switchtitan.config.mistakes import Mistake, Source, toml_place
from switchtitan.config.section import Section

SectionTypes = Mapping[str, type[Section] | Mapping[str, type[Section]]]
"""Section -> its class, or the classes by name among which its key `name` chooses."""

Path = tuple[str, ...]
"""The way to a key, e.g. ("training", "steps")."""


@dataclass
class Draft:
    """What the file and the command line say, section by section."""

    table: dict[str, Any]
    """Values by section and key, the command line's put over the file's."""
    section_types: SectionTypes
    chosen: dict[str, type[Section]] = field(default_factory=dict)
    """The class of each section; one whose `name` is wrong is left out."""
    overrides: Mapping[Path, Sequence[str]] = field(default_factory=dict)
    """The words that the command line gave for a key."""
    mistakes: list[Mistake] = field(default_factory=list)

    def value(self, path: Path) -> tuple[object, ...]:
        """The value given at `path` as a tuple of one, or an empty tuple where none was given."""
        value: object = self.table
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return ()
            value = value[name]
        return (value,)

    def type_at(self, path: Path) -> type[Any] | None:
        """The type of the section or key at `path`, None where there is none."""
        annotation: Any = self.chosen.get(path[0])
        for name in path[1:]:
            fields = annotation.model_fields if is_section_type(annotation) else {}
            annotation = fields[name].annotation if name in fields else None
        return annotation

    def refuse(self, path: Path, problem: str) -> None:
        """Notes a mistake at `path`, written as the user wrote it: in TOML's form or as an option."""
        words = self.overrides.get(path)
        if words is None:
            shown = [value for value in self.value(path) if not isinstance(value, dict)]
            self.mistakes.append(Mistake(f"{toml_place(path, *shown)}: {problem}", Source.FILE))
        else:
            option = f"--{'.'.join(path)} {' '.join(words)}"
            self.mistakes.append(Mistake(f"{option}: {problem}", Source.COMMAND_LINE))
