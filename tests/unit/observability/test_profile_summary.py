"""Summaries of traces written by hand: nested regions, threads, kernels and allocations."""

import json
from pathlib import Path
from typing import Any

import pytest

from switchtitan.observability.profile_summary import NUM_MEMORY_POINTS, read_summary

REGIONS = {"step", "forward", "backward", "update", "switch", "save"}


def span(cat: str, name: str, start: float, end: float, tid: int = 1, **args: Any) -> dict:
    """A span, in microseconds."""
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "args": args} | times


def annotation(name: str, start: float, end: float) -> dict:
    return span("user_annotation", name, start, end)


STEPS = [
    event
    for start in (0, 100_000)
    for event in (
        annotation("step", start, start + 50_000),
        annotation("forward", start, start + 10_000),
        annotation("FSDP::pre_forward", start, start + 9_000),
        annotation("backward", start + 10_000, start + 30_000),
        annotation("update", start + 30_000, start + 48_000),
        annotation("switch", start + 35_000, start + 40_000),
    )
]


def summary_of(folder: Path, events: list[dict]):
    trace = folder / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    return read_summary(trace, 3, REGIONS)


def test_regions_exclude_those_inside_and_cover_the_step(tmp_path):
    summary = summary_of(tmp_path, [*STEPS, annotation("save", 160_000, 190_000)])
    assert (summary.rank, summary.num_steps, summary.step_ms) == (3, 2, 50)
    host_ms = {name: time.host_ms for name, time in summary.regions.items()}
    assert host_ms == pytest.approx(
        {"step": 2, "forward": 10, "backward": 20, "update": 13, "switch": 5, "save": 30}
    )
    assert summary.share("switch") == pytest.approx(5 / 50)
    assert summary.share("missing") == 0
    assert not summary.is_on_gpu


def test_kernels_belong_to_the_region_in_which_any_thread_launched_them(tmp_path):
    launches = {1: 5_000, 2: 20_000, 3: 36_000, 4: 49_000, 5: 99_000}
    durations = {1: 1_000, 2: 6_000, 3: 2_000, 4: 1_000, 5: 7_000}
    events = [
        event
        for number, time in launches.items()
        for event in (
            span(
                "cuda_runtime", "cudaLaunchKernel", time, time + 5, 40 + number, correlation=number
            ),
            # Kernels run later, in other regions.
            span(
                "kernel",
                f"k{number % 2}",
                60_000,
                60_000 + durations[number],
                80 + number,
                correlation=number,
            ),
        )
    ]
    summary = summary_of(tmp_path, [*STEPS, *events])
    device_ms = {name: time.device_ms for name, time in summary.regions.items()}
    # Per step of two; the last kernel belongs to no region.
    assert device_ms == {"step": 0.5, "forward": 0.5, "backward": 3, "update": 0, "switch": 1}
    assert summary.share("backward") == pytest.approx(3 / 5)
    assert [(o.name, o.num_calls, o.self_ms) for o in summary.operations] == [
        ("k1", 3, 10),
        ("k0", 2, 7),
    ]


def test_self_time_of_operations_excludes_those_they_call_in_the_same_thread(tmp_path):
    events = [
        span("cpu_op", "outer", 0, 10_000),
        span("cpu_op", "inner", 2_000, 5_000),
        span("cpu_op", "inner", 5_000, 6_000),
        span("cpu_op", "inner", 2_000, 4_000, tid=2),
    ]
    operations = summary_of(tmp_path, events).operations
    assert [(o.name, o.num_calls, o.self_ms) for o in operations] == [
        ("outer", 1, 6),
        ("inner", 3, 6),
    ]
    assert sum(o.share for o in operations) == pytest.approx(1)


def test_the_curve_of_memory_keeps_peaks_and_prefers_the_gpu(tmp_path):
    def allocation(time: float, num_bytes: int, device: int) -> dict:
        args = {"Device Type": device, "Total Allocated": num_bytes}
        return {"ph": "i", "name": "[memory]", "ts": time, "args": args}

    on_gpu = [allocation(1000 * i, 2**20 * (7 if i == 1234 else 1), 1) for i in range(3000)]
    curve = summary_of(tmp_path, [*on_gpu, allocation(0, 2**30, 0)]).memory_mib
    assert len(curve) <= NUM_MEMORY_POINTS
    assert max(mib for _, mib in curve) == 7
    assert curve[0] == (0, 1)
    assert summary_of(tmp_path, [allocation(5, 2**21, 0)]).memory_mib == [(0, 2)]
    assert summary_of(tmp_path, []).memory_mib == []
