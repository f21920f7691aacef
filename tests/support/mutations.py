"""Random damage to valid files: to their bytes, and to the values of a JSON document."""

import copy
import json
import random
import re
from typing import Any

EXTREME_NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)
STRANGE_STRINGS = (
    "",
    ".",
    "..",
    "../outside",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "\ud800",
    "é" * 300,
    "x" * 5000,
    "none",
    "NaN",
    "-1",
    "{}",
)
_NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_BYTES_AS_NUMBERS = (
    b"-1",
    b"0",
    b"99999999999999999999",
    b"1" * 5000,
    b"1e999",
    b"nan",
    b"NaN",
    b"-inf",
    b"0x10",
)


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Returns `data` with one to three random changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        changed = draw.choice(_BYTE_CHANGES)(changed, draw)
    return bytes(changed)


def _flip_bit(data: bytearray, draw: random.Random) -> bytearray:
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _truncate(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data) + 1)]


def _insert(data: bytearray, draw: random.Random) -> bytearray:
    place = draw.randrange(len(data) + 1)
    noise = draw.choice(
        (draw.randbytes(draw.randint(1, 9)), b"\0", b'"', b"[" * 3000, b'{"a":' * 2000, b"\xff")
    )
    return data[:place] + noise + data[place:]


def _delete(data: bytearray, draw: random.Random) -> bytearray:
    first = draw.randrange(len(data) + 1)
    return data[:first] + data[first + draw.randint(1, 40) :]


def _repeat(data: bytearray, draw: random.Random) -> bytearray:
    first = draw.randrange(len(data) + 1)
    end = first + draw.randint(1, 80)
    return data[:end] + data[first:]


def _overwrite(data: bytearray, draw: random.Random) -> bytearray:
    first = draw.randrange(len(data) + 1)
    end = min(len(data), first + draw.choice((1, 2, 4, 8, 40)))
    return data[:first] + bytes([draw.choice((0, 0x7F, 0x80, 0xFF))]) * (end - first) + data[end:]


def _replace_number(data: bytearray, draw: random.Random) -> bytearray:
    numbers = list(_NUMBER.finditer(data[:50_000]))
    if not numbers:
        return data
    match = draw.choice(numbers)
    return data[: match.start()] + draw.choice(_BYTES_AS_NUMBERS) + data[match.end() :]


def _swap_lines(data: bytearray, draw: random.Random) -> bytearray:
    lines = bytes(data).splitlines(keepends=True)
    if len(lines) > 1:
        first, second = draw.sample(range(len(lines)), 2)
        lines[first] = lines[second] if draw.random() < 0.5 else b""
    return bytearray(b"".join(lines))


_BYTE_CHANGES = (
    _flip_bit,
    _truncate,
    _insert,
    _delete,
    _repeat,
    _overwrite,
    _replace_number,
    _swap_lines,
)


def mutate_json(value: Any, draw: random.Random) -> str:
    """Returns a JSON document like `value` with one to three random changes.

    Values are replaced by others of the same or another type, keys are dropped, renamed or
    repeated, items are dropped or repeated.
    """
    changed = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            break
        container, key = draw.choice(places)
        _change_item(container, key, draw)
    text = json.dumps(changed)
    if draw.random() < 0.1:
        text = _repeat_key(text, draw)
    return text


def _places(value: Any) -> Any:
    """Yields every container in `value` with every one of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _change_item(container: Any, key: Any, draw: random.Random) -> None:
    change = draw.random()
    if change < 0.15:
        del container[key]
    elif change < 0.25 and isinstance(container, dict):
        container[draw.choice((f"{key}x", key.upper(), *STRANGE_STRINGS))] = container.pop(key)
    elif change < 0.25:
        container.insert(key, copy.deepcopy(container[key]))
    elif change < 0.6 and isinstance(container[key], int | float):
        container[key] = draw.choice((*EXTREME_NUMBERS, container[key] + 1, container[key] * 1000))
    elif change < 0.6 and isinstance(container[key], str):
        container[key] = draw.choice((*STRANGE_STRINGS, container[key] + "x", container[key][:-1]))
    else:
        container[key] = draw.choice(
            (None, True, [], {}, [[]], {"": {}}, [1, 2, 3], *EXTREME_NUMBERS, *STRANGE_STRINGS)
        )


def _repeat_key(text: str, draw: random.Random) -> str:
    """Repeats a key of an object, with another value."""
    keys = list(re.finditer(r'[{,]\s*("[^"\\]*"): ', text))
    if not keys:
        return text
    match = draw.choice(keys)
    return f"{text[: match.start() + 1]}{match.group(1)}: 0, {text[match.start() + 1 :]}"
