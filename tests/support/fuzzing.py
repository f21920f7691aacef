"""Feeds damaged files to a reader: each is read or refused by a `UserError`, and nothing else.

The damage is random, to bytes of valid files or to the values of a JSON document.
"""

import copy
import json
import math
import random
import re
import signal
from contextlib import contextmanager

from switchtitan.errors import UserError


def fuzz(make_case, read, cases, min_refused=0.3):
    """Makes and reads damaged files. Fails if another error is raised, or the message of a
    `UserError` is empty or a traceback, or too few cases are refused: perhaps all are valid.

    Args:
        make_case: writes a damaged file. Returns what to show if the case fails.
        cases: seeds; the case of a failure's seed can be run alone.
        min_refused: the least fraction that must be refused.
    """
    num_refused = 0
    for seed in cases:
        case = make_case(random.Random(seed))
        try:
            with limited_cpu_time(20.0):
                read()
        except UserError as error:
            num_refused += 1
            message = str(error)
            assert message.strip(), seed
            assert "Traceback (most recent call last)" not in message, seed
        except BaseException as error:  # PanicException of Rust libraries is no Exception
            raise AssertionError(f"case {seed}: {repr(case)[:300]}") from error
    assert num_refused >= min_refused * len(cases), num_refused


@contextmanager
def limited_cpu_time(seconds):
    """Raises TimeoutError in the block if it uses more CPU time. A busy machine does not matter."""

    def stop(signum, frame):
        raise TimeoutError(f"more than {seconds} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


INTEGERS = (0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30)
EXTREME_NUMBERS = (*INTEGERS, 10**400, 0.5, 1e308, math.inf, -math.inf, math.nan)
PATHS = ("", ".", "..", "../outside", "/etc/passwd", "a/b", "a\0b")
STRANGE_STRINGS = (*PATHS, "\ud800", "é" * 300, "x" * 5000, "none", "NaN", "-1", "{}")
_NUMBER = re.compile(rb"-?\d+(\.\d+)?([eE][-+]?\d+)?")
_BYTES_AS_NUMBERS = (b"-1", b"0", b"9" * 20, b"1" * 5000, b"1e999", b"nan", b"-inf", b"0x10")


def mutate_bytes(data, draw):
    """Returns `data` with one to three random changes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        changed = draw.choice(_BYTE_CHANGES)(changed, draw)
    return bytes(changed)


def flip_bit(data, draw):
    """Flips a bit of `data`, in place, and returns it."""
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return data


def _replace_slice(data, draw):
    """Inserts, deletes, overwrites or truncates."""
    first = draw.randrange(len(data) + 1)
    end = draw.choice((first, min(first + draw.randint(1, 40), len(data)), len(data)))
    noise = (
        draw.randbytes(draw.randint(1, 9)),
        bytes([draw.choice((0, 127, 128, 255))]) * (end - first),
    )
    new = draw.choice((b"", *noise, b'"', b"[" * 3000, b'{"a":' * 2000))
    return data[:first] + new + data[end:]


def _replace_number(data, draw):
    numbers = list(_NUMBER.finditer(data[:50_000]))
    if not numbers:
        return data
    match = draw.choice(numbers)
    return data[: match.start()] + draw.choice(_BYTES_AS_NUMBERS) + data[match.end() :]


_BYTE_CHANGES = (flip_bit, _replace_slice, _replace_slice, _replace_number)


def mutate_json(value, draw):
    """Returns a JSON document like `value` with one to three random changes.

    Values are replaced by others of the same or another type, keys are dropped or renamed, items
    are dropped or repeated.
    """
    changed = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            break
        container, key = draw.choice(places)
        _change_item(container, key, draw)
    return json.dumps(changed)


def _places(value):
    """Yields every container in `value` with every one of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from _places(item)


def _change_item(container, key, draw):
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
