"""Speed, times of regions, memory and environment that a run reports."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from switchtitan.distributed.gpus import peak_flops_per_s
from switchtitan.observability import region_times
from switchtitan.observability.environment import describe_environment, versions
from switchtitan.observability.region_times import RegionTimes
from switchtitan.observability.throughput import Throughput, peak_memory_gib
from switchtitan.regions import STEP, region

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, `clock.now`, also that of regions."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(region_times.time, "perf_counter", lambda: clock.now)
    return clock


def throughput_of(**arguments):
    defaults = {"tokens_per_step": 600, "flops_per_token": 2e9}
    defaults |= {"peak_flops_per_s": 3e12, "num_steps": 110, "start_step": 10}
    defaults |= {"synchronize": lambda: None}
    return Throughput(**(defaults | arguments))


def test_speed_is_tokens_over_time(clock):
    throughput = throughput_of()
    clock.now += 99
    assert throughput.measure(11) == {}, "it includes compilation"
    clock.now += 20
    expected = {
        "throughput/tokens_per_s": 300,  # 10 steps of 600 tokens in 20 s
        "throughput/tflop_per_s_per_device": 0.6,  # 300 tokens/s of 2e9
        "throughput/mfu": 0.2,
        "throughput/eta_s": 89 * 2,
    }
    assert throughput.measure(21) == pytest.approx(expected)
    unknown = throughput_of(peak_flops_per_s=None, num_steps=11)
    clock.now += 5
    values = unknown.measure(11)
    assert "throughput/mfu" not in values
    # The only window of a run of one step.
    means = unknown.means()
    assert values["throughput/tokens_per_s"] == means["throughput/tokens_per_s"] == 120
    assert values["throughput/eta_s"] == 0


def test_excluded_time_counts_for_the_time_left_only(clock):
    throughput = throughput_of()
    clock.now += 50  # compilation
    throughput.measure(20)
    clock.now += 10
    with throughput.excluded():
        clock.now += 20
    values = throughput.measure(30)
    assert values["throughput/tokens_per_s"] == pytest.approx(600)
    assert values["throughput/eta_s"] == pytest.approx(80 * 3)
    assert throughput.means()["throughput/tokens_per_s"] == pytest.approx(600)
    assert throughput.means()["throughput/wall_time_s"] == pytest.approx(80)
    clock.now += 20
    assert throughput.measure(40)["throughput/tokens_per_s"] == pytest.approx(300)
    means = {"tokens_per_s": 400, "mfu": 400 * 2e9 / 3e12, "wall_time_s": 100}  # 20 steps in 30 s
    assert throughput.means() == pytest.approx({f"throughput/{k}": v for k, v in means.items()})


def test_queued_work_before_excluded_time_counts(clock):
    queued_s = []

    def synchronize():
        clock.now += sum(queued_s)
        queued_s.clear()

    throughput = throughput_of(synchronize=synchronize)
    throughput.measure(20)
    queued_s += [2.0] * 10  # the device is ten steps behind
    with throughput.excluded():
        synchronize()
        clock.now += 5
    assert throughput.measure(30)["throughput/tokens_per_s"] == pytest.approx(300)


def test_the_peak_is_known_of_the_exact_device_only():
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3") == pytest.approx(989.5e12)
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops_per_s("cpu") is None


def step(clock):
    with region(STEP):
        clock.now += 0.001  # in no other region
        with region("forward"):
            clock.now += 0.010
        with region("update"):
            clock.now += 0.020
            with region("switch"):
                clock.now += 0.004
            clock.now += 0.030


def test_times_of_regions_are_means_over_steps_without_regions_inside(clock):
    times = RegionTimes(CPU)
    step(clock)
    with times:
        step(clock)
        step(clock)
        with region("evaluate"):
            clock.now += 0.5
        measured = times.means()
        assert times.means() == {}, "each time counts once"
        with region("report"):
            clock.now += 0.1
            assert times.means() == {}, "it has not ended"
        assert times.means() == pytest.approx({"time/report_ms": 100})
    step(clock)
    assert times.means() == {}
    expected = {"forward": 10, "update": 50, "switch": 4, "other": 1, "step": 65, "evaluate": 500}
    assert measured == pytest.approx({f"time/{name}_ms": ms for name, ms in expected.items()})


@pytest.mark.skipif(not STATUS.exists(), reason="needs Linux")
def test_the_peak_of_memory_is_the_kernels():
    (peak_kib,) = re.findall(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    # getrusage also knows the peak of what this process was before it started Python.
    assert 0.99 * int(peak_kib) / 2**20 < peak_memory_gib(CPU) < 100


def test_recorded_versions_have_no_name_of_a_build(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.14.0.dev20261120+cu130")
    assert versions()["torch"] == describe_environment()["torch"] == "2.14.0.dev20261120"
    assert all(re.fullmatch(r"[\w.]+", found) for found in versions().values())
