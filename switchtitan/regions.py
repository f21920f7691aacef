"""Named regions of a run, such as "forward", for traces and for the time that each takes."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

STEP = "step"
"""The region around all others of an optimizer step."""
OUTSIDE_STEP = ("evaluate", "save", "report")
"""Regions outside of steps, which are timed per call."""


class RegionObserver(Protocol):
    """Something that records regions. Regions are nested, and all of one thread."""

    def begin(self, name: str) -> None:
        """Called at the start of a region."""
        ...

    def end(self) -> None:
        """Called at the end of the region begun last, also after an error."""
        ...


class _Unobserved:
    """The region of all names while nothing observes: entering it costs two calls."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class _Observed:
    __slots__ = ("_name", "_observers")

    def __init__(self, name: str) -> None:
        self._name = name
        self._observers: tuple[RegionObserver, ...] = ()

    def __enter__(self) -> None:
        # Those that begin are those that end, even if that changes inside.
        self._observers = _observers
        for observer in self._observers:
            observer.begin(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for observer in reversed(self._observers):
            observer.end()


_UNOBSERVED = _Unobserved()
_observers: tuple[RegionObserver, ...] = ()


def region(name: str) -> AbstractContextManager[None]:
    """Returns a context for the region `name`; for the main thread, outside of compiled code.

    A region inside another one interrupts it: times of regions exclude those inside.
    """
    return _Observed(name) if _observers else _UNOBSERVED


def observe_regions(observer: RegionObserver) -> None:
    """Calls `observer` from now on."""
    global _observers
    _observers = (*_observers, observer)


def stop_observing_regions(observer: RegionObserver) -> None:
    """Ends `observe_regions`; has no effect if it did not begin."""
    global _observers
    _observers = tuple(other for other in _observers if other is not observer)
