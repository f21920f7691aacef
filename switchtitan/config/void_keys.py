"""Keys of a file that the command line leaves without effect: dropped with a note, not refused.

So are keys of a base that the file over it leaves without effect. A key that is void by one file
alone, or that the command line itself sets, stays an error. So does every key that is void by
overrides that a program made, as for the rows of a comparison.
"""

import os
import sys
from collections.abc import Collection, Mapping, Sequence

from pydantic import ValidationError

from switchtitan.config.explain import Draft, Override
from switchtitan.config.fields import KeyPath, accepts
from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.config.toml_text import NONE_STRING, toml_value


def print_note(note: str) -> None:
    """Print a note on stderr; of several ranks only the first one prints it."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def ignore_note(note: str) -> None:
    """For processes that start ranks: the first rank prints the note."""


def void_keys(error: ValidationError, section: str) -> list[VoidKey]:
    """Return the void keys in an error of a section, with the section's name before the keys."""
    return [
        VoidKey(
            f"{section}.{void.key}",
            tuple(f"{section}.{cause}" for cause in void.because),
            void.problem,
        )
        for detail in error.errors()
        if isinstance(found := detail.get("ctx", {}).get("error"), VoidKeyError)
        for void in found.void
    ]


def drop_void(draft: Draft, void: VoidKey) -> bool:
    """Drop a key if the command line, or a file over the one that has it, has made it void.

    Returns:
        Whether it was dropped.
    """
    path = tuple(void.key.split("."))
    causes = [_cause_over(draft, tuple(key.split(".")), path) for key in void.because]
    cause = next((cause for cause in causes if cause is not None), None)
    if cause is None:
        return False
    _drop(draft, [path], cause, "it has no effect now")
    return True


def drop_implied(draft: Draft, source: KeyPath, implied: Mapping[str, object]) -> None:
    """Drop keys of a file that contradict what the key at `source` sets, on the command line or in
    a file over that one.

    Args:
        implied: keys of the same section, and the values that they get.
    """
    causes = {
        path: cause
        for key, value in implied.items()
        if draft.value(path := (source[0], key)) not in ((), *_spellings(value))
        and (cause := _cause_over(draft, source, path)) is not None
    }
    if causes:
        cause = next(iter(causes.values()))
        dashes = "--" if isinstance(cause, Override) else ""
        reason = f"{dashes}{'.'.join(source)} sets {'it' if len(causes) == 1 else 'them'}"
        _drop(draft, list(causes), cause, reason)


def drop_for_name(
    draft: Draft,
    section: str,
    cause: Override,
    former: object,
    name: str,
    implied: Collection[str] = (),
) -> None:
    """Drop the file's keys of a section that its new `name` does not have, or not with this value.

    The note says which keys are kept, since they may mean something else for the new name.

    Args:
        cause: what sets the new name.
        former: the file's name.
        implied: keys to leave for `drop_implied`.
    """
    types = draft.section_types[section]
    if not isinstance(types, Mapping) or former == name or former not in types:
        return
    fields, former_fields = types[name].model_fields, types[str(former)].model_fields
    dropped: list[KeyPath] = []
    kept: list[KeyPath] = []
    for key, value in draft.table[section].items():
        path = (section, key)
        if key in ("name", *implied) or key not in former_fields:
            continue
        if not _is_droppable(draft, path):
            continue
        is_kept = key in fields and (
            value == NONE_STRING or accepts(fields[key], value) or isinstance(value, dict)
        )
        (kept if is_kept else dropped).append(path)
    if dropped:
        _drop(draft, dropped, cause, f"not for [{section}] name = {toml_value(name)}")
    if kept:
        keys = ", ".join(_shown(draft, path) for path in kept)
        draft.notes.append(f"{cause}: kept {keys}, meant for name = {toml_value(former)}")


def _cause_over(draft: Draft, source: KeyPath, path: KeyPath) -> Override | str | None:
    """Return the override that changed the key at `source`, or the file that has it, if the key at
    `path` stands in a file below and can be dropped."""
    if source in draft.changes:
        return draft.changes[source] if _is_droppable(draft, path) else None
    if {source, path} & draft.overrides.keys() or not draft.value(source) or not draft.value(path):
        return None
    depth_of = {file: depth for depth, file in enumerate(draft.files)}
    file = draft.origin(source)
    return file if depth_of[file] < depth_of[draft.origin(path)] else None


def _is_droppable(draft: Draft, path: KeyPath) -> bool:
    return (
        draft.overrides_heading is None and path not in draft.overrides and draft.value(path) != ()
    )


def _drop(draft: Draft, paths: Sequence[KeyPath], cause: Override | str, reason: str) -> None:
    keys = ", ".join(_shown(draft, path) for path in paths)
    places = dict.fromkeys(draft.origin(path) for path in paths)
    draft.notes.append(f"{cause}: dropped {keys} of {', '.join(places)}: {reason}")
    for path in paths:
        table = draft.value(path[:-1])[0]
        assert isinstance(table, dict), "a key of a section"
        del table[path[-1]]
        if isinstance(cause, Override):
            # What only this key gave an effect is void now, too.
            draft.changes[path] = cause


def _shown(draft: Draft, path: KeyPath) -> str:
    return f"{'.'.join(path)} = {toml_value(draft.value(path)[0])}"


def _spellings(value: object) -> tuple[tuple[object], ...]:
    """The value as `Draft.value` returns it; None may be written as a string."""
    return ((None,), (NONE_STRING,)) if value is None else ((value,),)
