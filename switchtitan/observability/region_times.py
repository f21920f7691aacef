"""The mean time of each region of a step, for TensorBoard."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from switchtitan.regions import OUTSIDE_STEP, STEP, observers

_Mark = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event on the device's current stream."""


class RegionTimes:
    """A context in which regions are timed; see `switchtitan.regions`.

    On a CPU: by the host's clock. On a GPU: by events on the current stream, which are read when
    the device has passed them, so that the host never waits. They measure the device: reading a
    batch takes time only if the device is idle meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._inside: str | None = None
        self._ended = deque[tuple[str, str | None, _Mark, _Mark]]()
        """Name, region around it, beginning and end."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_calls: Counter[str] = Counter()

    def __enter__(self) -> "RegionTimes":
        observers.append(self.around)
        return self

    def __exit__(self, *error: object) -> None:
        observers.remove(self.around)

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Times a region."""
        outer, began = self._inside, self._mark()
        self._inside = name
        try:
            yield
        finally:
            self._inside = outer
            self._ended.append((name, outer, began, self._mark()))
            if outer is None:
                self._add_passed()

    def means(self) -> dict[str, float]:
        """Returns the mean times in milliseconds since the last call, by TensorBoard tag.

        Regions of a step: per step, without regions inside them; their sum and `time/other_ms` is
        `time/step_ms`. Regions of `OUTSIDE_STEP`: per call. On a GPU only what the device has done:
        call it when the host has waited for the device anyway.
        """
        self._add_passed()
        seconds, num_calls = self._seconds, self._num_calls
        self._seconds, self._num_calls = defaultdict(float), Counter()
        means = {name: seconds[name] / num_calls[name] for name in OUTSIDE_STEP if num_calls[name]}
        if num_steps := num_calls[STEP]:
            inside = num_calls.keys() - {*OUTSIDE_STEP, STEP}
            per_step = {name: seconds[name] / num_steps for name in sorted(inside)}
            per_step["other"] = seconds[STEP] / num_steps
            means |= per_step | {STEP: sum(per_step.values())}
        return {f"time/{name}_ms": 1000 * mean for name, mean in means.items()}

    def _mark(self) -> _Mark:
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_passed(self) -> None:
        """Adds up the spans that have ended, in the order in which they did."""
        while self._ended:
            name, outer, began, ended = self._ended[0]
            if isinstance(began, float) or isinstance(ended, float):
                seconds = ended - began  # type: ignore[operator]
            elif not ended.query():
                return  # does not wait for the device
            else:
                seconds = began.elapsed_time(ended) / 1000
            self._ended.popleft()
            self._seconds[name] += seconds
            self._num_calls[name] += 1
            # A region in an evaluation, say, does not belong to a step.
            if outer is not None:
                self._seconds[outer] -= seconds
