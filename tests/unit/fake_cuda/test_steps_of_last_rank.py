"""Steps on fake CUDA of a rank with fewer rows, or none."""

from pathlib import Path

import pytest
from support.fake_cuda.expected import LAST_RANK, steps_of, unexpected_in, unlike_those_on_a_cpu
from support.fake_cuda.process import needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]


def test_it_waits_for_nothing_and_takes_part_in_the_collectives_of_a_cpu(tmp_path: Path) -> None:
    steps, on_cpu = steps_of(LAST_RANK, tmp_path)
    assert unexpected_in(steps) == {}
    assert unlike_those_on_a_cpu(steps, on_cpu) == {}
    # Weights were merged in one step of two, and bases renewed.
    for name in ("resets", "galore bases"):
        first, second = steps[name]
        assert first.collectives != second.collectives
