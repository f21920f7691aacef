"""Steps of every method and option on fake CUDA: the host waits for nothing, and no access to
memory races with another."""

from pathlib import Path

from support.fake_cuda.cases import CASES, LONG
from support.fake_cuda.expected import FIRST_RANK, steps_of, unexpected_in, unlike_those_on_a_cpu
from support.fake_cuda.process import needs_compiler
from support.fake_cuda.step_checks import Observed
from support.packages import needs_torchao

pytestmark = needs_compiler


# One test for all findings: pytest-xdist would observe the steps in every process that runs a test.
def test_the_host_waits_for_nothing_and_collectives_are_those_on_a_cpu(tmp_path: Path) -> None:
    """Except for documented reads, and vectors that were put back two steps ago."""
    steps, on_cpu = steps_of(FIRST_RANK, tmp_path)
    assert unexpected_in(steps) == {}
    assert unlike_those_on_a_cpu(steps, on_cpu) == {}
    # Bases were renewed.
    assert any(step.reads for step in steps["galore"])
    assert all(len(steps[name]) == 9 for name in LONG)


def test_undocumented_findings_are_unexpected() -> None:
    nothing = Observed([], [], [], [], {})
    read, wait, svd = ["_local_scalar_dense at x.py:1"], ["Event.synchronize"], ["_linalg_svd at x"]
    harmless = {
        "full_rank": [nothing, nothing],
        "skip": [nothing._replace(reads=read)],
        "host candidates": [nothing, nothing._replace(waits=wait)],
        "galore": [nothing, nothing._replace(reads=svd)],
    }
    assert unexpected_in(harmless) == {}
    harmful = {
        "full_rank": [nothing, nothing._replace(copies=["copy"], races=["race"])],
        "skip": [nothing._replace(reads=read), nothing],
        "switchlora": [nothing._replace(waits=wait)],
        "galore": [nothing._replace(reads=svd), nothing],
    }
    assert unexpected_in(harmful) == {
        "copies": {"full_rank": [[], ["copy"]]},
        "reads": {"skip": [read, []], "galore": [svd, []]},
        "waits": {"switchlora": [wait]},
        "races": {"full_rank": [[], ["race"]]},
    }


@needs_torchao
def test_adamw8bit_is_among_the_cases() -> None:
    assert "adamw8bit" in CASES
