"""Steps of every method and option on fake CUDA: the host waits for nothing, and no access to
memory races with another."""

import pytest
from support.fake_cuda import cases, step_checks
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.step_checks import Observed

pytestmark = [needs_compiler, pytest.mark.slow]

# Both ends of the shards: the last rank has fewer rows, or none.
FIRST_RANK, LAST_RANK = 0, -1
Steps = dict[str, list[Observed]]
"""By case: steps 2, 3, ..."""


@pytest.fixture(scope="module", params=[FIRST_RANK, LAST_RANK], ids=["first rank", "last rank"])
def rank(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def steps(rank: int, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Steps 2 and later of each case."""
    num_steps = {
        # The last rank takes the same steps, with other numbers of rows.
        name: 2 if rank == LAST_RANK else 10 if name in cases.EVERY_STEP else 3
        for name in cases.CASES
    }
    folder = str(tmp_path_factory.mktemp("steps"))
    found = run_check(step_checks.steps_of_cases, folder, num_steps, rank)
    assert found.keys() == cases.CASES.keys()
    return {name: [Observed(*step) for step in of_case] for name, of_case in found.items()}


def test_no_copy_makes_the_host_wait(steps: Steps) -> None:
    assert found_in(steps, "copies") == {}


def test_only_documented_steps_read_values_on_the_host(steps: Steps, rank: int) -> None:
    reads = found_in(steps, "reads")
    # Reads the gradient's norm in every step.
    for of_step in reads.pop("skip"):
        assert [read.split(" at ")[0] for read in of_step] == ["_local_scalar_dense"]
    # torch's Adafactor reads the norms of each parameter and of its update.
    for of_step in reads.pop("adafactor"):
        assert {read.split(":")[0] for read in of_step} == {
            "_local_scalar_dense at optim/torch_optimizer.py"
        }
    # Decompositions check on the host whether they converged: steps 3, 5, ... renew the bases.
    for name in {"galore bases", "galore bases, HSDP"} & reads.keys():
        for number, of_step in enumerate(reads.pop(name), 2):
            assert {read.split(" at ")[0] for read in of_step} <= cases.DECOMPOSITIONS
            assert number % 2 == 1 or not of_step
    assert reads == {}
    if rank == FIRST_RANK:
        assert any(step.reads for step in steps["galore bases"])


def test_only_vectors_put_back_two_steps_ago_make_the_host_wait(
    steps: Steps,
) -> None:
    waits = found_in(steps, "waits")
    for name in [name for name in waits if "host candidates" in name]:
        for of_step in waits.pop(name):
            assert of_step in ([], ["Event.synchronize"])
    assert waits == {}


def test_accesses_to_memory_wait_for_each_other(
    steps: Steps,
) -> None:
    assert found_in(steps, "races") == {}


def found_in(steps: Steps, what: str) -> dict[str, list[list[str]]]:
    """What was found in each step of the cases in which anything was found."""
    found = {name: [getattr(step, what) for step in of_case] for name, of_case in steps.items()}
    return {name: of_case for name, of_case in found.items() if any(of_case)}


@pytest.mark.parametrize("name", sorted(cases.COUNTED_ON_CPU))
def test_collectives_are_those_counted_on_a_cpu(steps: Steps, on_cpu: dict, name: str) -> None:
    for step, counted in zip(steps[name], on_cpu[name], strict=False):
        assert step.collectives == counted


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The same cases' collectives in each step, from the second on, on fake CPU tensors."""
    return step_checks.collectives_on_cpu(tmp_path_factory.mktemp("cpu"), num_steps=3)
