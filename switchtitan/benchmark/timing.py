"""A stopwatch that does not make the host wait for the device, and calls timed in alternation, so
that what slows the machine down slows all of them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Side = TypeVar("Side")

WARM_UP_CALLS = 3
"""Calls of each function before the timed ones: they compile, allocate, and fill caches."""


class Stopwatch:
    """Takes the time at marks; on a CUDA device the time at which the device gets there.

    There, events in the device's stream are timed, not the host: waiting for the device at each
    mark would keep the host from running ahead, and so slow down what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_s: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Takes the time of all work given to the device so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._host_s.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Seconds between neighbouring marks; waits for the device, and forgets the marks."""
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


def in_order_of_round(sides: Sequence[Side], index: int) -> Sequence[Side]:
    """`sides`, in every second round in reverse, since what runs first may be slower or faster for
    being first."""
    return sides[::-1] if index % 2 else sides


def time_calls_in_turns(
    sides: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    calls_per_round: int,
) -> dict[str, NDArray[np.float64]]:
    """Times functions: in each round, `calls_per_round` calls of each in turn, every second round
    in reverse.

    Args:
        sides: what to call, by a name of the caller's choice; a call may return anything, which is
            dropped.
        device: on which the functions work.

    Returns:
        Seconds of every call by the same names, [rounds, calls].

    Raises:
        torch._dynamo.exc.RecompileError: if a timed call had to compile, so that its time would say
            nothing.
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
            for name in in_order_of_round(list(sides), index):
                stopwatch.intervals_s()
                stopwatch.mark()
                for _ in range(calls_per_round):
                    sides[name]()
                    stopwatch.mark()
                parts[name].append(stopwatch.intervals_s())
    return {name: np.array(of_side) for name, of_side in parts.items()}
