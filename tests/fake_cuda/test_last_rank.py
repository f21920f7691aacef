"""What the last of eight ranks does on fake CUDA: it has fewer rows, or none."""

import pytest
from support.fake_cuda import checks
from support.fake_cuda.cases import PERIOD, UNEVEN
from support.fake_cuda.process import needs_compiler, run_check
from support.fake_cuda.steps import unexpected_in

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_check(checks.steps_of_last_rank, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("name", sorted(UNEVEN))
def test_the_host_waits_for_nothing_and_nothing_races(found, name):
    assert unexpected_in(name, found["steps"][name]) == {}
    assert len(found["steps"][name]) >= PERIOD


@pytest.mark.parametrize("name", ["relora", "galore"])
def test_merges_and_new_bases_are_in_every_second_step(found, name):
    even, odd = found["steps"][name][::2], found["steps"][name][1::2]
    assert all(step.collectives == even[0].collectives for step in even)
    assert all(step.collectives == odd[0].collectives for step in odd)
    assert even[0].collectives != odd[0].collectives


def test_regions_are_timed(found):
    """Every span takes 1 ms. A step has one region "clip"; resets follow every second step."""
    for name in checks.TIMED:
        times = found["times"][name]
        assert times.keys() >= {f"time/{part}_ms" for part in ("data", "forward", "backward")}
        assert times["time/clip_ms"] == pytest.approx(1)
    assert found["times"]["switchlora"]["time/switch_ms"] == pytest.approx(1)
    assert found["times"]["relora"]["time/reset_ms"] == pytest.approx(1 / 2)


@pytest.mark.parametrize("name", checks.SAVED)
def test_a_save_waits_once_for_all_copies(found, name):
    # Values that are not finite: all tensors in host memory are copied to the device together.
    num_copies_of_search = 1 if "host candidates" in name else 0
    for parts in found["saves"][name]["saves"]:
        for part in ("collect", "copy", "write", "step"):
            assert parts[part].copies == parts[part].reads == parts[part].races == [], part
        assert parts["copy"].waits == ["Stream.synchronize"]
        assert len(parts["search"].copies) == num_copies_of_search
    for save in found["saves"][name]["saves without a wait"]:
        assert any("clone reads on the host" in race for race in save["write"].races)


def test_the_update_of_336_factors_takes_few_operations(found):
    """A copy of coefficients, and a call for each 8 factors of one width: 264 and 72 of them."""
    assert found["updates"]["350M"] == {"_to_copy": 1, "compiled": 264 // 8 + 72 // 8}


def test_an_uncompiled_update_takes_five_kernels_for_each_factor_and_four_for_each_call(found):
    """28 factors in four calls; FSDP pads the last rank's shards, which changes nothing."""
    counts = dict(found["updates"]["uneven, eager"])
    assert counts.pop("_to_copy") == 1
    assert sum(counts.values()) == 5 * 28 + 4 * 4, counts
