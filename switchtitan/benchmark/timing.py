"""A stopwatch that does not make the host wait for the device, and functions timed in alternation,
so that a slowdown of the machine affects all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Side = TypeVar("Side")

WARM_UP_CALLS = 3
"""Untimed calls of each function: they compile, allocate and fill caches."""


class Stopwatch:
    """Records times at marks; on CUDA, the times at which the device reaches them.

    On CUDA it records events: waiting for the device at each mark would keep the host from running
    ahead, and slow down the measured code.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_s: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Marks the end of all work queued so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._host_s.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Returns seconds between consecutive marks; waits for the device and clears the marks."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            intervals = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        else:
            intervals = [
                end - start for start, end in zip(self._host_s[:-1], self._host_s[1:], strict=True)
            ]
        self._host_s, self._events = [], []
        return intervals


def alternate(sides: Sequence[Side], index: int) -> Sequence[Side]:
    """Returns `sides`, reversed in every second round: the first may be slower or faster."""
    return sides[::-1] if index % 2 else sides


def time_calls_in_turns(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls_per_round: int,
) -> dict[str, NDArray[np.float64]]:
    """Times functions: each round makes `calls_per_round` calls of each, in alternating order.

    Args:
        sides: functions by any name; results are dropped.
        device: device of the functions.

    Returns:
        Seconds of every call by the same names, [rounds, calls].

    Raises:
        torch._dynamo.exc.RecompileError: if a timed call compiles, which invalidates its time.
    """
    assert rounds >= 1
    assert calls_per_round >= 1
    stopwatch = Stopwatch(device)
    for _ in range(WARM_UP_CALLS):
        for call in sides.values():
            call()
    parts: dict[str, list[list[float]]] = {name: [] for name in sides}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(rounds):
            for name in alternate(list(sides), index):
                stopwatch.intervals_s()
                stopwatch.mark()
                for _ in range(calls_per_round):
                    sides[name]()
                    stopwatch.mark()
                parts[name].append(stopwatch.intervals_s())
    return {name: np.array(rounds_of_one) for name, rounds_of_one in parts.items()}
