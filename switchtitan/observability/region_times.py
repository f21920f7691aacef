"""The mean time of each region of a step, for TensorBoard."""

import time
from collections import Counter, defaultdict, deque
from typing import NamedTuple, Protocol

import torch

from switchtitan.regions import OUTSIDE_STEP, STEP, observe_regions, stop_observing_regions


class RegionTimes:
    """A context in which regions are timed; see `switchtitan.regions`.

    On a CPU: by the host's clock. On a GPU: by events on the current stream, which are read when
    the device has passed them, so that the host never waits. They measure the device: reading a
    batch takes time only if the device is idle meanwhile.

    Args:
        device: the rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock: _Clock = _DeviceClock() if device.type == "cuda" else _HostClock()
        self._open: list[tuple[str, object]] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._num_calls: Counter[str] = Counter()

    def __enter__(self) -> "RegionTimes":
        observe_regions(self)
        return self

    def __exit__(self, *error: object) -> None:
        stop_observing_regions(self)

    def begin(self, name: str) -> None:
        """See `RegionObserver`."""
        self._open.append((name, self._clock.mark()))

    def end(self) -> None:
        """See `RegionObserver`."""
        name, began = self._open.pop()
        outer = self._open[-1][0] if self._open else None
        self._clock.add(_Span(name, outer, began, self._clock.mark()))
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
        milliseconds = {
            name: 1000 * seconds[name] / num_calls[name] for name in OUTSIDE_STEP if num_calls[name]
        }
        num_steps = num_calls[STEP]
        if num_steps:
            inside = [name for name in num_calls if name not in (*OUTSIDE_STEP, STEP)]
            of_step = {name: 1000 * seconds[name] / num_steps for name in inside}
            other = 1000 * seconds[STEP] / num_steps
            milliseconds |= of_step
            milliseconds |= {"other": other, STEP: other + sum(of_step.values())}
        return {f"time/{name}_ms": value for name, value in milliseconds.items()}

    def _add_passed(self) -> None:
        for span, seconds in self._clock.passed():
            self._seconds[span.name] += seconds
            self._num_calls[span.name] += 1
            # A region in an evaluation, say, does not belong to a step.
            if span.outer is not None:
                self._seconds[span.outer] -= seconds


class _Span(NamedTuple):
    name: str
    outer: str | None
    """The region around it."""
    began: object
    ended: object


class _Clock(Protocol):
    def mark(self) -> object:
        """Returns this moment."""
        ...

    def add(self, span: _Span) -> None: ...

    def passed(self) -> list[tuple[_Span, float]]:
        """Returns the added spans that have ended, with their seconds; each once."""
        ...


class _HostClock:
    def __init__(self) -> None:
        self._spans: list[tuple[_Span, float]] = []

    def mark(self) -> float:
        return time.perf_counter()

    def add(self, span: _Span) -> None:
        assert isinstance(span.began, float)
        assert isinstance(span.ended, float)
        self._spans.append((span, span.ended - span.began))

    def passed(self) -> list[tuple[_Span, float]]:
        spans, self._spans = self._spans, []
        return spans


class _DeviceClock:
    def __init__(self) -> None:
        self._spans: deque[_Span] = deque()
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        # Creating an event takes longer than recording it again.
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, span: _Span) -> None:
        self._spans.append(span)

    def passed(self) -> list[tuple[_Span, float]]:
        spans = []
        # In the order in which they ended. A query does not wait.
        while self._spans and self._spans[0].ended.query():  # type: ignore[attr-defined]
            span = self._spans.popleft()
            began, ended = span.began, span.ended
            assert isinstance(began, torch.cuda.Event)
            assert isinstance(ended, torch.cuda.Event)
            spans.append((span, began.elapsed_time(ended) / 1000))
            self._free += [began, ended]
        return spans
