"""What the first of eight ranks does on fake CUDA, in every case."""

import pytest
from support.fake_cuda import checks
from support.fake_cuda.cases import CASES, ON_CPU, PERIOD, num_steps_of
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.steps import unexpected_in


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_check(checks.steps_of_first_rank, tmp_path_factory.mktemp("steps"))


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_the_host_waits_for_nothing_and_nothing_races(found, name):
    """Except for documented reads, and vectors that were put back two steps ago."""
    steps = found["steps"][name]
    assert unexpected_in(name, steps) == {}
    assert len(steps) == num_steps_of(name) - 1
    # Bases were renewed.
    assert name != "galore" or steps[1].reads


@needs_compiler
def test_collectives_are_those_on_a_cpu(found):
    assert found["on a CPU"].keys() == ON_CPU
    for name, on_cpu in found["on a CPU"].items():
        assert [step.collectives for step in found["steps"][name]][:PERIOD] == on_cpu
