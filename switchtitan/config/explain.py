"""What pydantic found wrong with a section, in words that say how to mend it."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from switchtitan.config.draft import Draft, Path
from switchtitan.config.fields import accepts, choices, describe, dotted_keys, find_field, is_section_type
from switchtitan.config.mistakes import Mistake, Source, nearest
from switchtitan.config.overrides import interpret
from switchtitan.config.section import Section
from switchtitan.config.toml_text import toml_value


def explain(draft: Draft, section: str, error: ValidationError) -> None:
    """Notes one mistake in `draft` for every key of the section that `error` complains of."""
    seen: set[Path] = set()
    for detail in error.errors():
        path = _key_path(draft.chosen[section], section, detail)
        # A union complains once for each of its types, a list once for each item.
        if path in seen and detail["type"] not in ("value_error", "extra_forbidden"):
            continue
        seen.add(path)
        if detail["type"] == "extra_forbidden":
            _explain_unknown_key(draft, path)
        elif detail["type"] != "value_error":
            _explain_value(draft, path)
        elif is_section_type(draft.type_at(path)):
            text = f"[{'.'.join(path)}] {detail['ctx']['error']}"
            draft.mistakes.append(Mistake(text, Source.TOGETHER))
        else:
            draft.refuse(path, str(detail["ctx"]["error"]))


def _explain_unknown_key(draft: Draft, path: Path) -> None:
    """Notes that there is no such key, with the nearest one that there is."""
    section, *_, key = path
    keys = draft.type_at(path[:-1]).model_fields  # type: ignore[union-attr]
    near = nearest(key, keys)
    others = [other for other in draft.chosen if other != section and key in draft.chosen[other].model_fields]
    owners = _names_with_key(draft, section, key)
    if owners:
        hint = f"it is a key of [{section}] name = {' or '.join(map(toml_value, owners))}"
        if (section, "name") in draft.overrides and path not in draft.overrides:
            hint += f"; with --{section}.name, take a file that is made for that name, or remove this line"
    elif near:
        hint = f"did you mean {near}?"
    elif others:
        hint = f"did you mean [{others[0]}] {key}?"
    else:
        hint = f"expected one of {', '.join(keys)}"
    draft.refuse(path, f"unknown key; {hint}")


def explain_unknown_section(draft: Draft, section: str) -> None:
    """Notes that there is no such section or, for a key above all sections, where it belongs."""
    options = dotted_keys(draft.chosen)
    homes = [option for option in options if option.partition(".")[2] == section]
    near = nearest(section, draft.section_types)
    if homes:
        home, _, key = homes[0].partition(".")
        hint = f"did you mean [{home}] {key}?"
    elif near:
        hint = f"did you mean [{near}]?"
    else:
        hint = f"expected one of {', '.join(draft.section_types)}"
    paths = [path for path in draft.overrides if path[0] == section] or [(section,)]
    for path in paths:
        draft.refuse(path, f"unknown section; {hint}")


def explain_name(draft: Draft, section: str, names: Iterable[str]) -> None:
    """Notes that a section's `name` is missing or chooses nothing."""
    names = sorted(names)
    expected = f"expected {'one of ' if len(names) > 1 else ''}{', '.join(map(toml_value, names))}"
    given = draft.value((section, "name"))
    if not given:
        draft.refuse((section, "name"), f"missing; {expected}")
        return
    draft.refuse((section, "name"), expected + _did_you_mean(given[0], names))


def _key_path(section_type: type[Section], section: str, detail: ErrorDetails) -> Path:
    """The way to the key that a complaint is about, without the items and union branches below it."""
    path: Path = (section,)
    current: object = section_type
    for step in detail["loc"]:
        if not is_section_type(current):
            break
        path = (*path, str(step))
        field = current.model_fields.get(str(step))  # type: ignore[attr-defined]
        current = field.annotation if field else None
    return path


def _names_with_key(draft: Draft, section: str, key: str) -> list[str]:
    types = draft.section_types[section]
    if not isinstance(types, Mapping):
        return []
    return [name for name, section_type in types.items() if key in section_type.model_fields]


def _explain_value(draft: Draft, path: Path) -> None:
    field = find_field(draft.chosen[path[0]], path[1:])
    given = draft.value(path)
    if field is None:
        draft.refuse(path, f"expected a table: [{'.'.join(path)}] and its keys below it")
        return
    if not given:
        draft.refuse(path, f"missing; expected {describe(field)}")
        return
    value, hint = given[0], ""
    words = draft.overrides.get(path, [])
    if len(words) > 1 and accepts(field, " ".join(words)):
        hint = f", got {len(words)} words; quote what has blanks in it"
    elif isinstance(value, str) and path not in draft.overrides:
        reading = interpret(field, [value])
        if not isinstance(reading, str) and accepts(field, reading):
            hint = f"; write {toml_value(reading)}"
    elif isinstance(value, float) and value.is_integer() and accepts(field, int(value)):
        hint = f"; write {int(value)}"
    elif not isinstance(value, (list, dict)) and accepts(field, [value]):
        hint = f"; write {toml_value([value])}"
    elif not isinstance(value, str) and accepts(field, str(value)):
        hint = f"; write {toml_value(str(value))}"
    draft.refuse(path, f"expected {describe(field)}" + (hint or _did_you_mean(value, choices(field))))


def _did_you_mean(value: object, names: Iterable[str]) -> str:
    near = nearest(value, names) if isinstance(value, str) else None
    return f"; did you mean {toml_value(near)}?" if near else ""
