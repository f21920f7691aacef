"""Numbers that JSON does not have become null, wherever they are."""

import json
from types import MappingProxyType

from switchtitan.json_values import finite_or_none


def test_numbers_that_are_not_finite_become_none_at_any_depth():
    value = {
        "list": [1, float("inf"), [-float("inf")]],
        "tuple": (0.5, float("nan"), ({"deep": float("nan")},)),
        "mapping": MappingProxyType({"a": float("inf"), "b": True}),
        "text": "inf",
        "none": None,
    }
    expected = {
        "list": [1, None, [None]],
        "tuple": [0.5, None, [{"deep": None}]],
        "mapping": {"a": None, "b": True},
        "text": "inf",
        "none": None,
    }
    assert finite_or_none(value) == expected
    assert json.loads(json.dumps(finite_or_none(value), allow_nan=False)) == expected
