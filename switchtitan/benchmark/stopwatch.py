"""Times between points of a program, without making the host wait for the device between them."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer


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


class MarkedOptimizer:
    """An optimizer that calls `mark` where its update begins and ends; a `contracts.TrainingOptimizer`."""

    def __init__(self, optimizer: TrainingOptimizer, mark: Callable[[], None]) -> None:
        self._optimizer, self._mark = optimizer, mark

    def step(self) -> None:
        self._mark()
        self._optimizer.step()
        self._mark()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def set_lr(self, lr_factor: float) -> None:
        self._optimizer.set_lr(lr_factor)

    def metrics(self) -> dict[str, float]:
        return self._optimizer.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._optimizer.load_state_dict(state)
