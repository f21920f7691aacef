"""Functions are called in alternation, and timed by name."""

import numpy as np
import pytest
import torch

from switchtitan.benchmark.tables import call_record, call_table
from switchtitan.benchmark.timing import WARM_UP_CALLS, time_calls_in_turns

CPU = torch.device("cpu")


def test_the_order_alternates_from_round_to_round() -> None:
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = time_calls_in_turns(sides, CPU, rounds=3, calls_per_round=2)
    assert "".join(calls) == "abc" * WARM_UP_CALLS + "aabbcc" + "ccbbaa" + "aabbcc"
    assert list(times) == ["a", "b", "c"]
    assert all(seconds.shape == (3, 2) and (seconds > 0).all() for seconds in times.values())


def test_a_timed_call_that_compiles_is_refused() -> None:
    torch._dynamo.reset()
    scaled = torch.compile(lambda x, factor: x * factor, backend="eager", dynamic=False)
    factors = iter(range(99))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        time_calls_in_turns({"a": lambda: scaled(torch.ones(3), next(factors))}, CPU, 2, 2)
    torch._dynamo.reset()


def test_ratios_in_table_and_record_refer_to_the_first_function() -> None:
    times = {"first": np.full((3, 2), 0.002), "other": np.full((3, 2), 0.003)}
    header, first, other = call_table(times)
    assert header.split()[:2] == ["ms/call", "quartiles"]
    assert first.split() == ["2", "2-2", "1", "first"]
    assert other.split() == ["3", "3-3", "1.500", "1.500-1.500", "other"]
    record = call_record(times)
    assert record["other"]["ratio"] == pytest.approx(1.5)
    assert record["other"]["round_medians_s"] == [0.003] * 3
