"""Named regions of a run, such as "forward", for traces and for the time that each takes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

STEP = "step"
"""The region around all others of an optimizer step."""
OUTSIDE_STEP = ("evaluate", "save", "report")
"""Regions outside of steps, which are timed per call."""

observers: list[Callable[[str], AbstractContextManager[object]]] = []
"""Each returns a context around the region of a name. Those in this list when a region begins are
called. Regions are nested, and all of one thread."""


@contextmanager
def region(name: str) -> Iterator[None]:
    """A context for the region `name`; for the main thread, outside of compiled code.

    A region inside another one interrupts it: times of regions exclude those inside.
    """
    with ExitStack() as contexts:
        for observer in observers:
            contexts.enter_context(observer(name))
        yield
