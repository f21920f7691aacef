"""The configuration: typed, frozen sections from TOML files, their bases and the command line."""

import difflib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args

import tomli
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from switchtitan.errors import ConfigError
from switchtitan.registry import NONE, UNKNOWN, Registry, Section, explain, mistakes, toml_value

FOLDER = Path(str(resources.files("switchtitan"))) / "train_configs"
"""The configurations that are installed with the package."""
QUICKSTART = FOLDER / "llama_quickstart_switchlora.toml"
"""The configuration that is used if none is given."""

KeyPath = tuple[str, ...]
"""Path of a key, e.g. ("training", "steps")."""
ConfigT = TypeVar("ConfigT", bound=Section)


def split_arguments(
    argv: Sequence[str], section: str | None = None
) -> tuple[Path | None, bool, dict[KeyPath, list[str]]]:
    """Splits a command line into the file of `--config`, whether `--help` is wanted, and the words
    after each `--section.key`, also of `--section.key=value`. Raises a ConfigError if a word is
    no option's, or an option has no value or is given twice.

    Args:
        section: its keys may be given without it, e.g. `--path` for `--data.path`.
    """
    wants_help = False
    options: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in argv:
        if word in ("-h", "--help", "--help-all"):
            wants_help, words = True, None
        elif word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            option = option.replace("-", "_")
            if section is not None and option != "config" and "." not in option:
                option = f"{section}.{option}"
            if option in options:
                raise ConfigError(f"{word}: given twice; keep one")
            words = options[option] = [value] if equals else []
        elif words is None:
            raise ConfigError(f"{word}: expected --config FILE or --section.key value")
        else:
            words.append(word)
    for option, given in options.items():
        if not given or (option == "config" and len(given) > 1):
            raise ConfigError(f"--{' '.join([option, *given])}: expected one value")
    file = Path(options.pop("config")[0]) if "config" in options else None
    return file, wants_help, {tuple(key.split(".")): given for key, given in options.items()}


def find_config(given: Path) -> Path:
    """Returns `given` if it exists, else the installed configuration of that name.

    So `llama_350m.toml` and `train_configs/llama_350m.toml` work in any working directory.
    """
    files = [given, FOLDER / given, FOLDER.parent / given]
    return next((file for file in files if os.path.exists(file) and file.suffix == ".toml"), given)


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a TOML file; a `ConfigError` says why it cannot be read."""
    try:
        return parse_toml(file.read_text(encoding="utf-8"), str(file))
    except FileNotFoundError as error:
        names = [other.stem for other in FOLDER.glob("*.toml")]
        hint = _did_you_mean(file.stem, names).replace("?", ".toml?")
        raise ConfigError(f"{file}: no such file{hint}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r}: cannot be read: {error}") from error


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parses a TOML document, which `where` names in errors."""
    try:
        return tomli.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid TOML: {error}") from error


def load_table(file: Path, config_type: type[ConfigT]) -> ConfigT:
    """Reads and validates a file as one section; a `ConfigError` names all mistakes."""
    try:
        return _validate(config_type, read_toml(file))
    except ValidationError as error:
        raise ConfigError(f"{file}: {explain(error)}") from error


def raise_together(problems: Sequence[str]) -> None:
    """Raises one `ConfigError` for all problems, if there are any."""
    if problems:
        count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"invalid configuration ({count})", *problems]))


def load_config(
    config_type: type[ConfigT],
    tables: Sequence[tuple[str, dict[str, Any]]],
    overrides: Mapping[KeyPath, list[str]],
    say: Callable[[str], None],
) -> ConfigT:
    """Merge, override and validate a configuration that consists of sections. Raises a ConfigError
    with all mistakes in one message.

    Args:
        tables: those of files, with the files' names for errors; later ones win.
        overrides: the words after each `--section.key`.
        say: called with a note on each key of the tables that the command line drops.
    """
    draft = _Draft(config_type, say, tables[-1][0] if tables else "command line")
    for file, table in tables:
        draft.add_table(table, file)
    # A section's name decides how the words of its other keys are read.
    expansions = config_type.expansions
    for key in sorted(overrides, key=lambda key: (key not in expansions, key[-1] != "name")):
        draft.override(key, overrides[key])
    draft.check_expanded()
    sections = {section: draft.validated(section) for section in draft.types}
    raise_together(draft.problems)
    return config_type(**sections)


def section_types(config_type: type[Section]) -> dict[str, dict[str, type[Section]]]:
    """Returns each section's classes by `name`, or its only class by ""."""
    types: dict[str, Any] = {}
    for section, field in config_type.model_fields.items():
        registries = [entry for entry in field.metadata if isinstance(entry, Registry)]
        types[section] = registries[0].config_types() if registries else {"": field.annotation}
    return types


def read_with_bases(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names and tables of a file's lowest base up to its own; see `load_config`."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        table = read_toml(file)
        base = table.pop("base", None)
        chain.insert(0, (file, table))
        if base is None:
            return [(str(path), table) for path, table in chain]
        place = f"{file}: base = {toml_value(base)}"
        if not isinstance(base, str):
            raise ConfigError(f"{place}: expected the path of a file")
        local, installed = file.parent / base, FOLDER / base
        file = installed if os.path.exists(installed) and not os.path.exists(local) else local
        if file.resolve() in [path.resolve() for path, _ in chain]:
            raise ConfigError(f"{place}: a file cannot be based on itself")


class _Draft:
    """The values that were read so far, where they stand, and what is wrong with them."""

    def __init__(self, config_type: type[Section], say: Callable[[str], None], file: str) -> None:
        self.types = section_types(config_type)
        self.problems: list[str] = []
        self._expansions, self._say, self._file = config_type.expansions, say, file
        self._table: dict[str, dict[str, Any]] = {section: {} for section in self.types}
        self._origins: dict[KeyPath, str] = {}
        """The file of each key, or its option with the words after it."""
        self._expanded: dict[str, tuple[str, Mapping[str, object]]] = {}
        """Section -> a key that stands for others, with its value, and those others."""

    def add_table(self, table: Mapping[str, Any], file: str) -> None:
        """Puts a file's values over those of its base. A section of another `name` replaces it."""
        for section, keys in table.items():
            if section not in self.types or not isinstance(keys, dict):
                hint = _did_you_mean(section, ["base", *self.types, *self._known_keys()])
                self.problems.append(f"{file}: {section}: expected a section like [data]{hint}")
                continue
            given, below = keys, self._table[section]
            keys = self._expand(section, given, file)
            if "name" in keys and below.get("name", keys["name"]) != keys["name"]:
                below.clear()
                if keys is given:  # else they are those that another key stands for
                    self._expanded.pop(section, None)
            self._put(section, keys, file)

    def override(self, path: KeyPath, words: list[str]) -> None:
        """Puts the value of an option over the file's. Another `name` drops keys of the former."""
        option = f"--{'.'.join(path)} {' '.join(words)}"
        if len(path) != 2 or path[0] not in self.types:
            hint = _did_you_mean(".".join(path), ["config", *self._known_keys()], "--")
            self.problems.append(f"{option}: expected --section.key value{hint}")
            return
        section, key = path
        former, below = self._fields(section), self._table[section]
        value = words[0] if key == "name" else _read_words(words, former.get(key))
        keys = self._expand(section, {key: value}, option)
        name = str(keys.get("name"))
        if name in self.types[section] and name != below.get("name"):
            fields = self.types[section][name].model_fields
            for other in [other for other in former if other in below and other != "name"]:
                if other not in fields or not _accepts(fields[other], below[other]):
                    dropped = toml_value(below.pop(other))
                    self._say(f"{option}: dropped [{section}] {other} = {dropped}")
        self._put(section, keys, option)

    def check_expanded(self) -> None:
        """Reports keys that contradict the key that stands for them."""
        for section, (source, keys) in self._expanded.items():
            for key, value in keys.items():
                found = self._table[section].get(key, value)
                if found not in (value, NONE if value is None else value):
                    place = self._place(section, key, f" = {toml_value(found)}")
                    self.problems.append(f"{place}: contradicts {source}; remove one of the two")

    def _put(self, section: str, keys: Mapping[str, Any], origin: str) -> None:
        self._table[section] |= keys
        self._origins |= {(section, key): origin for key in keys}

    def _expand(self, section: str, keys: dict[str, Any], origin: str) -> dict[str, Any]:
        """Returns the keys, with those that one of them stands for."""
        for key, value in keys.items():
            if (section, key) not in self._expansions or value in (None, NONE):
                continue
            source = f"{key} = {toml_value(value)}"
            try:
                others = self._expansions[section, key](str(value))
            except ConfigError as error:
                # Without those keys, there would be many more problems.
                raise_together([*self.problems, f"{origin}: {source}: {error}"])
            self._expanded[section] = (source, others)
            return {**others, **keys, key: None}
        return keys

    def validated(self, section: str) -> Section | None:
        """Returns a section, or None after adding its problems."""
        values, types, chosen = self._table[section], self.types[section], self._class_of(section)
        if chosen is None:
            name = str(values.get("name"))
            given = f" = {toml_value(name)}" if "name" in values else ""
            place = f"{self._place(section, 'name', given)}:{'' if given else ' missing;'}"
            choices = f"{', '.join(types)}{_did_you_mean(name, types)}"
            self.problems.append(f"{place} expected one of {choices}")
            return None
        try:
            return _validate(chosen, values)
        except ValidationError as error:
            for key, given, problem in mistakes(error):
                if problem == UNKNOWN:
                    expected = f"; expected one of {', '.join(chosen.model_fields)}"
                    problem += _did_you_mean(f"{section}.{key}", self._known_keys()) or expected
                place = f"{self._place(section, key, given)}:" if key else f"[{section}]"
                self.problems.append(f"{place} {problem}")
        return None

    def _class_of(self, section: str) -> type[Section] | None:
        """Returns a section's class, None if its name is wrong."""
        types = self.types[section]
        return types.get("" if "" in types else str(self._table[section].get("name")))

    def _fields(self, section: str) -> dict[str, FieldInfo]:
        chosen = self._class_of(section)
        return {} if chosen is None else chosen.model_fields

    def _known_keys(self) -> list[str]:
        return [f"{section}.{key}" for section in self.types for key in self._fields(section)]

    def _place(self, section: str, key: str, given: str = "") -> str:
        """Returns where a key stands: `FILE: [section] key = value`, or its option."""
        origin = self._origins.get((section, key), self._file)
        return origin if origin.startswith("--") else f"{origin}: [{section}] {key}{given}"


def _validate(section_type: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Validates values from TOML: strictly, since `steps = "8"` is a mistake."""
    fields = section_type.model_fields
    values = {key: _with_none(value, fields.get(key)) for key, value in values.items()}
    return section_type.model_validate_json(json.dumps(values, default=str), strict=True)


def _with_none(value: object, key: FieldInfo | None) -> object:
    """Returns None for `NONE`, if the key accepts it."""
    admits_none = key is not None and NoneType in get_args(key.annotation)
    return None if value == NONE and admits_none else value


def _did_you_mean(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Returns a hint at the choice with the same last part, or at the most similar one."""
    choices, last = list(choices), word.rpartition(".")[2]
    same = [choice for choice in choices if choice.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(word, choices, n=1, cutoff=0.75)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _accepts(key: FieldInfo, value: object) -> bool:
    try:
        _adapter(key).validate_json(json.dumps(_with_none(value, key), default=str), strict=True)
    except ValidationError:
        return False
    return True


def _adapter(key: FieldInfo) -> TypeAdapter[Any]:
    annotation: Any = Annotated[key.annotation, key]
    return TypeAdapter(annotation)


def _read_words(words: list[str], key: FieldInfo | None) -> object:
    """Reads the words of an option as TOML, a string, or a list, whichever the key accepts."""
    readings: list[object] = [[_literal(word) for word in words], words]
    if len(words) == 1:
        items = [item.strip() for item in words[0].strip("[]").split(",")]
        readings = [_literal(words[0]), words[0], [_literal(item) for item in items], items]
    accepted = (reading for reading in readings if key is not None and _accepts(key, reading))
    # If none is, the message is about the numbers of a list rather than about a string.
    return next(accepted, readings[-2 if "," in words[0] else 0])


def _literal(word: str) -> object:
    if word.lower() == NONE:
        return NONE
    try:
        value = tomli.loads(f"value = {word}")["value"]
    except (ValueError, RecursionError):
        with suppress(ValueError):  # Python and shells write .5 and 5., which TOML does not have
            return float(word) if "." in word else word
        return word
    # No key takes a date or a time.
    return value if isinstance(value, str | bool | int | float | list | dict) else word


def resolved_toml(config: Section) -> str:
    """Returns the configuration with all defaults, as TOML that loads as an equal one."""
    lines = []
    for section, keys in config:
        lines += [f"[{section}]", *(f"{key} = {toml_value(value)}" for key, value in keys), ""]
    return "\n".join(lines)


def flatten(table: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Returns a nested table's values by dotted key, tuples as lists."""
    flat: dict[str, object] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def describe(key: FieldInfo) -> str:
    """Describes what a key accepts, e.g. `integer >= 1 or "none"`."""
    return _describe(_adapter(key).json_schema())


def _describe(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(map(_describe, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return ", ".join(map(toml_value, schema.get("enum", [schema.get("const")])))
    kind = schema.get("format", schema.get("type", "table"))
    words = {"null": '"none"', "boolean": "true or false", "array": "list"}.get(kind, kind)
    if schema.get("items"):
        words += f" of {_describe(schema['items'])}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]}" for bound, sign in bounds.items() if bound in schema]
    return f"{words} {' and '.join(limits)}".strip()


def help_text(config: Section, usage: str) -> str:
    """Returns `usage`, and every key with its value, what it accepts and its first sentence."""
    lines = [usage]
    for section, types in section_types(type(config)).items():
        lines += ["", f"[{section}]"]
        values: Section = getattr(config, section)
        for key, field in type(values).model_fields.items():
            accepted = describe(field) if key != "name" or "" in types else " or ".join(types)
            sentence = re.split(r'(?<=\.)(?<!e\.g\.)\s+(?=[A-Z"`])', field.description or "")[0]
            lines.append(f"  --{section}.{key} (default: {toml_value(getattr(values, key))})")
            lines.append(textwrap.indent(textwrap.fill(f"{accepted}. {sentence}", 90), " " * 6))
    return "\n".join(lines)
