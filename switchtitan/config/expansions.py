"""Keys that stand for other keys of their section, such as `[model] from_folder`."""

from collections.abc import Callable, Mapping

from switchtitan.config.explain import Draft, raise_together
from switchtitan.config.fields import KeyPath
from switchtitan.config.toml_text import NONE_STRING, toml_value
from switchtitan.config.void_keys import drop_for_name, drop_implied
from switchtitan.errors import ConfigError

Expand = Callable[[str], Mapping[str, object]]
"""Value of a key -> other keys of its section, which it stands for; raises a `ConfigError`."""


def expand(
    draft: Draft, expansions: Mapping[KeyPath, Expand]
) -> dict[KeyPath, Mapping[str, object]]:
    """Return the keys that each given key of `expansions` stands for, and set the section's name.

    Raises:
        ConfigError: with all mistakes so far, if a key cannot be expanded: without the keys that it
            stands for, validation would report many more.
    """
    expanded: dict[KeyPath, Mapping[str, object]] = {}
    for path, keys_of in expansions.items():
        override = draft.overrides.get(path)
        given = draft.value(path) if override is None else (override.words[0],)
        if not given or not isinstance(given[0], str) or given[0] == NONE_STRING:
            continue  # validation reports a wrong type
        try:
            expanded[path] = keys_of(given[0])
        except ConfigError as error:
            draft.add_error(path, str(error))
            raise_together(draft.mistakes)
        section = draft.table.setdefault(path[0], {})
        if isinstance(section, dict) and "name" in expanded[path]:
            _set_name(draft, path, expanded[path])
    return expanded


def fill_in(draft: Draft, path: KeyPath, keys: Mapping[str, object]) -> None:
    """Replace the key at `path` by the keys that it stands for; report keys that contradict it.

    If the command line has the key at `path`, keys of the file that contradict it are dropped.
    """
    section_name, key = path
    section = draft.table[section_name]
    if not isinstance(section, dict):
        return  # validation reports it
    source = f"{key} = {toml_value(section.pop(key))}"
    drop_implied(draft, path, keys)
    for name, value in keys.items():
        if section.get(name, value) not in (value, NONE_STRING if value is None else value):
            draft.add_error(
                (section_name, name),
                f"contradicts {source}, which says {toml_value(value)}; remove one of the two",
            )
    section |= keys


def _set_name(draft: Draft, path: KeyPath, keys: Mapping[str, object]) -> None:
    section, name = draft.table[path[0]], str(keys["name"])
    former = section.setdefault("name", name)
    override = draft.overrides.get(path)
    is_set = (path[0], "name") in draft.overrides or draft.overrides_heading is not None
    if override is None or is_set or former == name:
        return
    section["name"] = name
    drop_for_name(draft, path[0], override, former, name, implied=keys)
