"""What was measured as plain values."""

from switchtitan.geometry.report import _finite


def test_numbers_that_json_lacks_are_none():
    record = {"a": [1.5, float("nan")], "b": {"c": float("inf"), "d": "text", "e": 3}}
    assert _finite(record) == {"a": [1.5, None], "b": {"c": None, "d": "text", "e": 3}}
