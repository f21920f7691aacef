"""What a trace of some steps says: time per region, operations, memory over time."""

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from switchtitan.regions import OUTSIDE_STEP, STEP

NUM_OPERATIONS = 20
"""Operations in a summary: those with the most self time."""
NUM_MEMORY_POINTS = 500
"""Points of a curve of memory, at most."""
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_CPU, _CUDA = 0, 1
"""`Device Type` of an allocation in a trace."""


class RegionTime(NamedTuple):
    """The time of a region in the traced steps, without regions inside it.

    Per step; those of `OUTSIDE_STEP` per call.
    """

    num_calls: int
    host_ms: float
    """By the clock of the host, which on a GPU only launches work."""
    device_ms: float
    """Of kernels and copies that were launched in it, also by other threads."""


class OperationTime(NamedTuple):
    """An operation in the traced steps, or a kernel on a GPU."""

    name: str
    num_calls: int
    self_ms: float
    """In all traced steps, without the operations that it calls."""
    share: float
    """Of the self times of all operations."""


@dataclass(frozen=True)
class ProfileSummary:
    """Summary of one rank's trace."""

    rank: int
    num_steps: int
    step_ms: float
    """Mean time of a step on the host, without evaluation, save and report."""
    regions: dict[str, RegionTime]
    """Those of `STEP` are the step's time in no other region."""
    operations: list[OperationTime]
    """Kernels if the trace has any, otherwise operations on the CPU."""
    memory_mib: list[tuple[float, float]]
    """Milliseconds since the start of the trace, and MiB allocated; empty if not recorded. On a
    CPU: without what was allocated before the trace."""

    @property
    def is_on_gpu(self) -> bool:
        return any(region.device_ms for region in self.regions.values())

    def share(self, region: str) -> float:
        """Returns the share of a region in the time of a step: of the device's time on a GPU."""
        times = {
            name: time.device_ms if self.is_on_gpu else time.host_ms
            for name, time in self.regions.items()
            if name not in OUTSIDE_STEP
        }
        total = sum(times.values())
        return times.get(region, 0.0) / total if total else 0.0


def read_summary(trace: Path, rank: int, regions: Collection[str]) -> ProfileSummary:
    """Summarizes a trace in Chrome's format, as torch's profiler writes it.

    Args:
        regions: names of the regions of `switchtitan.regions`.
    """
    events = json.loads(trace.read_bytes())["traceEvents"]
    timed = [event for event in events if event.get("ph") == "X"]
    on_device = [event for event in timed if event.get("cat") in _ON_DEVICE]
    on_host = [event for event in timed if event.get("cat") == "cpu_op"]
    annotations = [
        event
        for event in timed
        if event.get("cat") == "user_annotation" and event["name"] in regions
    ]
    num_steps = sum(event["name"] == STEP for event in annotations)
    return ProfileSummary(
        rank=rank,
        num_steps=num_steps,
        step_ms=sum(event["dur"] for event in annotations if event["name"] == STEP)
        / 1000
        / max(1, num_steps),
        regions=_region_times(annotations, timed, on_device, max(1, num_steps)),
        operations=_operation_times(on_device or on_host),
        memory_mib=_memory(events),
    )


def _self_us(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Returns the microseconds of each event without events of its thread inside it."""
    own = [event["dur"] for event in events]
    of_thread = defaultdict(list)
    for index, event in enumerate(events):
        of_thread[event["pid"], event["tid"]].append(index)
    for indices in of_thread.values():
        outer: list[int] = []
        for index in sorted(indices, key=lambda i: (events[i]["ts"], -events[i]["dur"])):
            event = events[index]
            while outer and event["ts"] >= _end(events[outer[-1]]):
                outer.pop()
            if outer:
                own[outer[-1]] -= event["dur"]
            outer.append(index)
    return list(zip(events, own, strict=True))


def _end(event: dict[str, Any]) -> float:
    end: float = event["ts"] + event["dur"]
    return end


def _region_times(
    annotations: list[dict[str, Any]],
    timed: list[dict[str, Any]],
    on_device: list[dict[str, Any]],
    num_steps: int,
) -> dict[str, RegionTime]:
    host_us: defaultdict[str, float] = defaultdict(float)
    num_calls: Counter[str] = Counter()
    for event, own in _self_us(annotations):
        host_us[event["name"]] += own
        num_calls[event["name"]] += 1
    device_us = _device_us(annotations, timed, on_device) if on_device else {}
    divisors = {name: num_calls[name] if name in OUTSIDE_STEP else num_steps for name in num_calls}
    return {
        name: RegionTime(
            num_calls[name],
            host_us[name] / 1000 / divisor,
            device_us.get(name, 0.0) / 1000 / divisor,
        )
        for name, divisor in divisors.items()
    }


def _device_us(
    annotations: list[dict[str, Any]], timed: list[dict[str, Any]], on_device: list[dict[str, Any]]
) -> dict[str, float]:
    """Returns the device's microseconds by the region in which the work was launched.

    Autograd's threads launch the backward pass, so a launch belongs to a region by its time.
    """
    launched_at = {
        event["args"]["correlation"]: event["ts"]
        for event in timed
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }
    # (time, name of the innermost region from then on)
    borders: list[tuple[float, str | None]] = []
    outer: list[dict[str, Any]] = []
    for event in sorted(annotations, key=lambda e: (e["ts"], -e["dur"])):
        while outer and event["ts"] >= _end(outer[-1]):
            ended = outer.pop()
            borders.append((_end(ended), outer[-1]["name"] if outer else None))
        outer.append(event)
        borders.append((event["ts"], event["name"]))
    while outer:
        ended = outer.pop()
        borders.append((_end(ended), outer[-1]["name"] if outer else None))
    times = [time for time, _ in borders]
    total: dict[str, float] = defaultdict(float)
    for event in on_device:
        launch = launched_at.get(event.get("args", {}).get("correlation"))
        if launch is None:
            continue
        place = bisect_right(times, launch) - 1
        name = borders[place][1] if place >= 0 else None
        if name is not None:
            total[name] += event["dur"]
    return total


def _operation_times(events: list[dict[str, Any]]) -> list[OperationTime]:
    self_us: defaultdict[str, float] = defaultdict(float)
    num_calls: Counter[str] = Counter()
    for event, own in _self_us(events):
        self_us[event["name"]] += own
        num_calls[event["name"]] += 1
    total = sum(self_us.values()) or 1.0
    return [
        OperationTime(name, num_calls[name], own / 1000, own / total)
        for name, own in nlargest(NUM_OPERATIONS, self_us.items(), key=itemgetter(1))
    ]


def _memory(events: list[dict[str, Any]]) -> list[tuple[float, float]]:
    found: dict[int, list[tuple[float, float]]] = {_CPU: [], _CUDA: []}
    for event in events:
        if event.get("name") == "[memory]":
            device = event["args"]["Device Type"]
            found.setdefault(device, []).append((event["ts"], event["args"]["Total Allocated"]))
    points = sorted(found[_CUDA] or found[_CPU])
    if not points:
        return []
    start = points[0][0]
    # The highest of each part of the curve: peaks matter.
    size = -(-len(points) // NUM_MEMORY_POINTS)
    parts = [points[first : first + size] for first in range(0, len(points), size)]
    return [
        ((part[0][0] - start) / 1000, max(num_bytes for _, num_bytes in part) / 2**20)
        for part in parts
    ]
