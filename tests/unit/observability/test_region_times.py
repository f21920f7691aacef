"""Region times: each region without those inside, and all of them together the step's."""

import time

import pytest
import torch

from switchtitan.observability import region_times as module
from switchtitan.observability.region_times import RegionTimes
from switchtitan.regions import STEP, region

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, as the only item."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def step(now: list[float]) -> None:
    with region(STEP):
        now[0] += 0.001  # in no other region
        with region("forward"):
            now[0] += 0.010
        with region("update"):
            now[0] += 0.020
            with region("switch"):
                now[0] += 0.004
            now[0] += 0.030


def test_times_are_means_over_steps_without_regions_inside(clock):
    with RegionTimes(CPU) as times:
        step(clock)
        step(clock)
        with region("evaluate"):
            clock[0] += 0.5
        measured = times.means()
    assert measured == pytest.approx(
        {
            "time/forward_ms": 10,
            "time/update_ms": 50,
            "time/switch_ms": 4,
            "time/other_ms": 1,
            "time/step_ms": 65,
            "time/evaluate_ms": 500,
        }
    )


def test_every_time_is_counted_once(clock):
    with RegionTimes(CPU) as times:
        step(clock)
        times.means()
        assert times.means() == {}
        with region("save"):
            clock[0] += 0.25
        assert times.means() == pytest.approx({"time/save_ms": 250})


def test_a_report_inside_a_region_does_not_count_it_before_it_ends(clock):
    with RegionTimes(CPU) as times:
        step(clock)
        with region("report"):
            clock[0] += 0.1
            assert "time/report_ms" not in times.means()
        assert times.means() == pytest.approx({"time/report_ms": 100})


def test_nothing_is_timed_outside_the_context(clock):
    times = RegionTimes(CPU)
    step(clock)
    with times:
        pass
    step(clock)
    assert times.means() == {}


def seconds_of_one_region(repetitions: int = 2_000) -> float:
    """This thread's CPU time: other processes may use the core meanwhile."""
    best = float("inf")
    for _ in range(50):
        began = time.thread_time()
        for _ in range(repetitions):
            with region("any"):
                pass
        best = min(best, time.thread_time() - began)
    return best / repetitions


def test_regions_cost_less_than_two_microseconds_unobserved_and_ten_timed():
    """0.1 and 1.4 microseconds on a free core; a step of a tiny run has 23 regions in 29 ms."""
    assert seconds_of_one_region() < 2e-6
    with RegionTimes(CPU) as times:
        assert seconds_of_one_region() < 10e-6
        times.means()
