"""Error messages for a configuration: where the error is, what was expected, and what to do."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from switchtitan.config.fields import (
    KeyPath,
    accepts,
    choices,
    describe,
    dotted_keys,
    interpret,
    is_section_type,
    item_section_type,
)
from switchtitan.config.section import Section
from switchtitan.config.toml_text import toml_value
from switchtitan.errors import ConfigError

COMMAND_LINE = "on the command line:"
TOGETHER = "values that do not fit together:"

SectionTypes = Mapping[str, type[Section] | Mapping[str, type[Section]]]
"""Section -> its class, or name -> class for a section whose key `name` chooses its class."""


@dataclass(frozen=True)
class Mistake:
    """One line of the message, e.g. `[training] steps = "9": expected an integer`."""

    heading: str
    """Group in the message: a file, the command line, or values that do not fit together."""
    message: str


@dataclass(frozen=True)
class Override:
    """A key's value on the command line."""

    option: str
    """As typed, e.g. `--training.steps`."""
    words: list[str]
    """The arguments after it."""

    def __str__(self) -> str:
        return f"{self.option} {' '.join(self.words)}"


@dataclass
class Draft:
    """The values in the files and on the command line, and all mistakes found so far."""

    config_type: type[Section]
    section_types: SectionTypes
    table: dict[str, Any]
    """Values by key. Values of the command line replace those of the files."""
    chosen: dict[str, type[Section]] = field(default_factory=dict)
    """The class of each section, without sections whose `name` is wrong."""
    origins: Mapping[KeyPath, str] = field(default_factory=dict)
    """The file of each key that is not in `file`."""
    file: str = ""
    files: Sequence[str] = ()
    """`file`, its base, the base of that, and so on."""
    overrides: Mapping[KeyPath, Override] = field(default_factory=dict)
    overrides_heading: str | None = None
    """For overrides that a program made: the heading under which they are shown, as in a file."""
    mistakes: list[Mistake] = field(default_factory=list)
    changes: dict[KeyPath, Override] = field(default_factory=dict)
    """Keys whose value differs from the file's, or that an override dropped -> that override."""
    notes: list[str] = field(default_factory=list)
    """What was dropped."""

    def value(self, path: KeyPath) -> tuple[object, ...]:
        """Return the value at `path` as a tuple of one, or an empty tuple if there is none."""
        value: Any = self.table
        for name in path:
            if isinstance(value, list) and name.isdigit() and int(name) < len(value):
                value = value[int(name)]
            elif isinstance(value, dict) and name in value:
                value = value[name]
            else:
                return ()
        return (value,)

    def type_at(self, path: KeyPath) -> Any:
        """Return the type of the section or key at `path`, None if there is none."""
        annotation: Any = self.config_type
        for depth, name in enumerate(path):
            if item_section_type(annotation) is not None and name.isdigit():
                annotation = item_section_type(annotation)
            elif is_section_type(annotation) and name in annotation.model_fields:
                annotation = annotation.model_fields[name].annotation
            else:
                return None
            if depth == 0 and name in self.section_types:
                annotation = self.chosen.get(name)
        return annotation

    def field_at(self, path: KeyPath) -> FieldInfo | None:
        """Return the field of the key at `path`, None if there is none."""
        section = self.type_at(path[:-1])
        return section.model_fields.get(path[-1]) if is_section_type(section) else None

    def add_error(self, path: KeyPath, problem: str) -> None:
        """Add a mistake at `path`, written as the user wrote the key: in TOML or as an option."""
        override = self.overrides.get(path)
        if override is not None and self.overrides_heading is None:
            self.mistakes.append(Mistake(COMMAND_LINE, f"{override}: {problem}"))
            return
        given = self.value(path)
        place = toml_place(path, *(value for value in given if not _is_table(value)))
        if len(path) == 1 and not given and not is_section_type(self.type_at(path)):
            place = path[0]
        self.mistakes.append(Mistake(self._heading(path), f"{place}: {problem}"))

    def _heading(self, path: KeyPath) -> str:
        """Return the heading for a key, or for the place where it is missing."""
        if self.overrides_heading is not None:
            belongs = (
                path in self.overrides
                if self.value(path)
                else path[0] in {key[0] for key in self.overrides}
            )
            if belongs:
                return self.overrides_heading
        return f"in {self.origin(path)}:"

    def origin(self, path: KeyPath) -> str:
        """Return the file of the key at `path`, or of the table where it is missing."""
        prefixes = (path[:length] for length in range(len(path), 0, -1))
        origins = (self.origins[prefix] for prefix in prefixes if prefix in self.origins)
        return next(origins, self.file)


def toml_place(path: Sequence[str], *given: object) -> str:
    """Return a key as in a file: `[section] key = value`, or `[section] key` without a value."""
    *tables, key = path
    values = "".join(f" = {toml_value(value)}" for value in given)
    if key.isdigit():
        return f"[[{'.'.join(tables)}]] number {int(key) + 1}{values}"
    if tables and tables[-1].isdigit():
        return f"{toml_place(tables)}, {key}{values}"
    if not tables and not given:
        return f"[{key}]"
    return (f"[{'.'.join(tables)}] " if tables else "") + key + values


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the choice most similar to `word`, None if no similarity reaches `cutoff`.

    Args:
        cutoff: from 0 to 1, see `difflib.get_close_matches`.
    """
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = get_close_matches(word.lower(), by_lower_case, n=1, cutoff=cutoff)
    return by_lower_case[matches[0]] if matches else None


def raise_together(mistakes: Sequence[Mistake]) -> None:
    """Raise one error for all mistakes.

    Raises:
        ConfigError: if there are mistakes; the message has all of them, grouped by heading.
    """
    if not mistakes:
        return
    lines = [f"invalid configuration ({len(mistakes)} error{'s' if len(mistakes) > 1 else ''})"]
    headings = dict.fromkeys(mistake.heading for mistake in mistakes)
    # Files first, then the command line, then values that do not fit together.
    for heading in sorted(
        headings, key=lambda heading: (heading == TOGETHER, heading == COMMAND_LINE)
    ):
        lines.append(heading)
        lines += [f"  {mistake.message}" for mistake in mistakes if mistake.heading == heading]
    raise ConfigError("\n".join(lines))


def explain(draft: Draft, error: ValidationError, section: KeyPath = ()) -> None:
    """Add one mistake to `draft` for every key in pydantic's `error`.

    Args:
        section: the path of the validated table, empty for the full configuration.
    """
    seen: set[KeyPath] = set()
    for detail in error.errors():
        if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
            _explain_name(draft, section[0])
            continue
        path = _key_path(draft, section, detail)
        # pydantic reports one error for each type of a union and for each item of a list.
        if path in seen and detail["type"] not in ("value_error", "extra_forbidden"):
            continue
        seen.add(path)
        if detail["type"] == "extra_forbidden":
            _explain_unknown_key(draft, path)
        elif detail["type"] != "value_error":
            _explain_value(draft, path)
        elif path and not (is_section_type(draft.type_at(path)) or path[-1].isdigit()):
            draft.add_error(path, str(detail["ctx"]["error"]))
        else:
            place = f"{toml_place(path)} " if path else ""
            draft.mistakes.append(Mistake(TOGETHER, f"{place}{detail['ctx']['error']}"))


def explain_unknown_section(draft: Draft, section: str) -> None:
    """Add a mistake for an unknown section, or for a key outside any section."""
    options = dotted_keys(draft.chosen)
    homes = [option for option in options if option.partition(".")[2] == section]
    near = nearest(section, [*draft.section_types, "base"])
    if homes:
        home, _, key = homes[0].partition(".")
        hint = f"did you mean [{home}] {key}?"
    elif near:
        hint = 'did you mean base = "FILE"?' if near == "base" else f"did you mean [{near}]?"
    else:
        hint = f"expected one of {', '.join(draft.section_types)}"
    paths = [path for path in draft.overrides if path[0] == section] or [(section,)]
    for path in paths:
        draft.add_error(path, f"unknown section; {hint}")


def _explain_name(draft: Draft, section: str) -> None:
    """Add a mistake for a section's `name` that is missing or unknown."""
    names = sorted(draft.section_types[section])  # type: ignore[arg-type]
    expected = f"expected {'one of ' if len(names) > 1 else ''}{', '.join(map(toml_value, names))}"
    given = draft.value((section, "name"))
    if given:
        draft.add_error((section, "name"), expected + _did_you_mean(given[0], names))
    else:
        draft.add_error((section, "name"), f"missing; {expected}")


def _explain_unknown_key(draft: Draft, path: KeyPath) -> None:
    """Add a mistake for an unknown key, with the nearest known one."""
    *tables, key = path
    section = tables[0] if tables else ""
    keys = draft.type_at(path[:-1]).model_fields
    near = nearest(key, keys)
    others = [
        other
        for other in draft.chosen
        if other != section and key in draft.chosen[other].model_fields
    ]
    owners = _names_with_key(draft, section, key)
    if owners:
        hint = f"it is a key of [{section}] name = {' or '.join(map(toml_value, owners))}"
        if (section, "name") in draft.overrides and path not in draft.overrides:
            hint += f"; with --{section}.name, choose a file for that name, or remove this line"
    elif near:
        hint = f"did you mean {near}?"
    elif others:
        hint = f"did you mean [{others[0]}] {key}?"
    else:
        hint = f"expected one of {', '.join(keys)}"
    draft.add_error(path, f"unknown key; {hint}")


def _explain_value(draft: Draft, path: KeyPath) -> None:
    key, given = draft.field_at(path), draft.value(path)
    if key is None or (given and is_section_type(key.annotation)):
        below = "" if any(map(str.isdigit, path)) else f": [{'.'.join(path)}] and its keys below it"
        draft.add_error(path, f"expected a table{below}")
        return
    if not given:
        draft.add_error(path, f"missing; expected {describe(key)}")
        return
    value, hint = given[0], ""
    override = draft.overrides.get(path)
    words = override.words if override else []
    if len(words) > 1 and accepts(key, " ".join(words)):
        hint = f", got {len(words)} arguments; quote values that contain spaces"
    elif isinstance(value, str) and not override:
        reading = interpret(key, [value])
        if not isinstance(reading, str) and accepts(key, reading):
            hint = f"; write {toml_value(reading)}"
    elif isinstance(value, float) and value.is_integer() and accepts(key, int(value)):
        hint = f"; write {int(value)}"
    elif not isinstance(value, (list, dict)) and accepts(key, [value]):
        hint = f"; write {toml_value([value])}"
    elif not isinstance(value, str) and accepts(key, str(value)):
        hint = f"; write {toml_value(str(value))}"
    draft.add_error(
        path, f"expected {describe(key)}" + (hint or _did_you_mean(value, choices(key)))
    )


def _key_path(draft: Draft, section: KeyPath, detail: ErrorDetails) -> KeyPath:
    """Return the path of the key in a pydantic error, without list items and union branches."""
    path, steps = section, detail["loc"]
    if section and isinstance(draft.section_types[section[0]], Mapping):
        # The first step is the branch of the discriminated union.
        steps = steps[1:]
    for step in steps:
        below = draft.type_at(path)
        if not is_section_type(below) and item_section_type(below) is None:
            break
        path = (*path, str(step))
    return path


def _names_with_key(draft: Draft, section: str, key: str) -> list[str]:
    types = draft.section_types.get(section)
    if not isinstance(types, Mapping):
        return []
    return [name for name, section_type in types.items() if key in section_type.model_fields]


def _did_you_mean(value: object, names: Iterable[str]) -> str:
    near = nearest(value, names) if isinstance(value, str) else None
    return f"; did you mean {toml_value(near)}?" if near else ""


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and any(isinstance(item, dict) for item in value)
    )
