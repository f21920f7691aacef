"""Named regions of a run, such as "forward", for traces and for the time that each takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

STEP = "step"
"""The region around all others of an optimizer step."""
OUTSIDE_STEP = ("evaluate", "save", "report")
"""Regions outside of steps, which are timed per call."""


class RegionObserver(Protocol):
    """Records regions, which are nested and all of one thread."""

    def begin(self, name: str) -> None: ...

    def end(self) -> None:
        """Called at the end of the region begun last, also after an error."""


_observers: tuple[RegionObserver, ...] = ()


@contextmanager
def region(name: str) -> Iterator[None]:
    """Returns a context for the region `name`; for the main thread, outside of compiled code.

    A region inside another one interrupts it: times of regions exclude those inside.
    """
    # Those that begin are those that end, even if that changes inside.
    observers = _observers
    for observer in observers:
        observer.begin(name)
    try:
        yield
    finally:
        for observer in reversed(observers):
            observer.end()


def observe_regions(observer: RegionObserver) -> None:
    """Calls `observer` from now on."""
    global _observers
    _observers = (*_observers, observer)


def stop_observing_regions(observer: RegionObserver) -> None:
    """Ends `observe_regions`; has no effect if it did not begin."""
    global _observers
    _observers = tuple(other for other in _observers if other is not observer)
