"""Observers of fake CUDA find what is planted into steps, and nothing else."""

import pytest
from support.fake_cuda import plants
from support.fake_cuda.collective_plants import NOT_WAITING, WAITING
from support.fake_cuda.process import needs_compiler, run_check

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return run_check(plants.planted, str(tmp_path_factory.mktemp("plants")))


def test_blocking_copies_are_found(planted: dict[str, dict]) -> None:
    found = planted["planted_blocking_copies"]
    harmless = {"fill", "page-locked"}
    assert {name for name, copies in found.items() if copies} == found.keys() - harmless
    assert harmless <= found.keys()


def test_reads_are_found(planted: dict[str, dict]) -> None:
    found = planted["planted_reads"]
    harmless = {"shape", "where"}
    assert {name for name, reads in found.items() if reads} == found.keys() - harmless
    assert harmless <= found.keys()


def test_mistakes_in_a_step_are_found(planted: dict[str, dict]) -> None:
    observed = planted["planted_in_clipping"]
    copies, reads, waits, races, collectives = observed["nothing"]
    assert copies == reads == waits == races == []
    assert [read.split(" at ")[0] for read in observed["item"][1]] == ["_local_scalar_dense"]
    num_calls = observed["collective"][4]["all_reduce"][0]
    assert num_calls == collectives["all_reduce"][0] + 1
    (message,) = observed["devices"]
    assert "cuda:0" in message
    assert "cpu" in message


def test_each_missing_wait_of_a_copy_is_found(planted: dict[str, dict]) -> None:
    races = planted["planted_races"]
    assert races.pop("none") == []
    assert [mistake for mistake, found in races.items() if not found] == []


def test_collectives_that_the_stream_does_not_wait_for_are_found(
    planted: dict[str, dict],
) -> None:
    races = planted["planted_collectives"]
    assert races.keys() == WAITING.keys() | NOT_WAITING.keys()
    assert {name for name, found in races.items() if found} == NOT_WAITING.keys()


def test_steps_that_do_not_wait_are_found(planted: dict[str, dict]) -> None:
    races = planted["planted_races_in_steps"]
    assert [name for name, found in races.items() if not found] == []
    assert all(
        "distributed/kept_weights.py" in race for race in races["frozen weights gathered once"]
    )


def test_a_kernel_per_layer_is_found(planted: dict[str, dict]) -> None:
    kernels = planted["planted_kernel_per_layer"]
    assert sum(kernels["per layer"].values()) > 2 * sum(kernels["nothing"].values())
