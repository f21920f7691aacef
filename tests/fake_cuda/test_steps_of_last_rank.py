"""Steps on fake CUDA of a rank with fewer rows, or none."""

from pathlib import Path

from support.fake_cuda.cases import LONG
from support.fake_cuda.expected import LAST_RANK, steps_of, unexpected_in, unlike_those_on_a_cpu
from support.fake_cuda.process import needs_compiler

pytestmark = needs_compiler


def test_it_waits_for_nothing_and_takes_part_in_the_collectives_of_a_cpu(tmp_path: Path) -> None:
    steps, on_cpu = steps_of(LAST_RANK, tmp_path)
    assert unexpected_in(steps) == {}
    assert unlike_those_on_a_cpu(steps, on_cpu) == {}
    assert all(len(steps[name]) == 9 for name in LONG)
    # Weights were merged in one step of two, and bases renewed.
    for name in ("relora", "galore"):
        even, odd = steps[name][::2], steps[name][1::2]
        assert all(step.collectives == even[0].collectives for step in even)
        assert all(step.collectives == odd[0].collectives for step in odd)
        assert even[0].collectives != odd[0].collectives
