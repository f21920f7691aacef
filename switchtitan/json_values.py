"""Values that JSON can hold."""

import math
from collections.abc import Mapping


def finite_or_none(value: object) -> object:
    """Returns `value` with None in place of numbers that are not finite, which JSON does not have.

    Looks into mappings, lists and tuples, and returns dicts and lists.
    """
    if isinstance(value, Mapping):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
