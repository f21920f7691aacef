"""Times between points of a program, without making the host wait for the device between them."""

import time

import torch


class Stopwatch:
    """Takes the time at marks; on a CUDA device the time at which the device gets there.

    There, events in the device's stream are timed, not the host: waiting for the device at each mark would keep the host from
    running ahead, and so slow down what is measured.
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
            intervals = [end - start for start, end in zip(self._host_s[:-1], self._host_s[1:], strict=True)]
        self._host_s, self._events = [], []
        return intervals
