"""Named regions of a run, such as "forward", for traces and for the time that each takes."""

from collections.abc import Callable
from contextlib import AbstractContextManager

STEP = "step"
"""The region around all others of an optimizer step."""
OUTSIDE_STEP = ("evaluate", "save", "report")
"""Regions outside of steps, which are timed per call."""


RegionObserver = Callable[[str], AbstractContextManager[object]]
"""Name of a region -> a context around it. Regions are nested, and all of one thread."""
_observers: tuple[RegionObserver, ...] = ()


class region:  # noqa: N801
    """A context for the region `name`; for the main thread, outside of compiled code.

    A region inside another one interrupts it: times of regions exclude those inside.
    """

    def __init__(self, name: str) -> None:
        self._contexts = [observer(name) for observer in _observers]

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self._contexts):
            context.__exit__(None, None, None)


def observe_regions(observer: RegionObserver) -> None:
    """Calls `observer` from now on."""
    global _observers
    _observers = (*_observers, observer)


def stop_observing_regions(observer: RegionObserver) -> None:
    """Ends `observe_regions`; has no effect if it did not begin."""
    global _observers
    _observers = tuple(other for other in _observers if other != observer)
