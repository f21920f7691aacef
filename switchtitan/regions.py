"""Named regions of a run, such as "forward", for traces and for the time that each takes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

STEP = "step"
"""The region around all others of an optimizer step."""
OUTSIDE_STEP = ("evaluate", "save", "report")
"""Regions outside of steps, which are timed per call."""


RegionObserver = Callable[[str], AbstractContextManager[object]]
"""Name of a region -> a context around it. Regions are nested, and all of one thread."""
_observers: tuple[RegionObserver, ...] = ()


@contextmanager
def region(name: str) -> Iterator[None]:
    """A context for the region `name`; for the main thread, outside of compiled code.

    A region inside another one interrupts it: times of regions exclude those inside.
    """
    with ExitStack() as contexts:
        for observer in _observers:
            contexts.enter_context(observer(name))
        yield


def observe_regions(observer: RegionObserver) -> None:
    """Calls `observer` from now on."""
    global _observers
    _observers = (*_observers, observer)


def stop_observing_regions(observer: RegionObserver) -> None:
    """Ends `observe_regions`; has no effect if it did not begin."""
    global _observers
    _observers = tuple(other for other in _observers if other != observer)
