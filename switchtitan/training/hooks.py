"""Hooks that a run calls around its steps, and garbage collection between steps."""

import gc
from contextlib import AbstractContextManager
from typing import Protocol


class Hook(Protocol):
    """What a run does around its steps. All ranks call all methods in the same order."""

    def around(self, step: int) -> AbstractContextManager[None]:
        """Returns a context for step `step`, from 1; called again if the update was skipped."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether to call `after` when `step` steps are done."""
        ...

    def after(self, step: int) -> None:
        """Works after step `step`; all gradients have been finite so far."""
        ...


YOUNG_INTERVAL, FULL_INTERVAL = 50, 1000
"""Steps between collections of the young generations, which take milliseconds, and of all."""


class GarbageCollection:
    """A context in which, after the first step, only `step` collects garbage.

    Python's collector runs inside a step, at different steps on different ranks, and ranks wait for
    each other. After torch.compile, which leaves many objects, it stalls a step by about 0.25 s.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        return self

    def step(self) -> None:
        """Counts a step, and collects if a collection is due."""
        self._num_steps += 1
        if self._num_steps == 1:
            # Disabled after the first step, which starts the data workers: they inherit this
            # setting and need their collector.
            self._was_enabled = gc.isenabled()
            gc.disable()
        if self._num_steps == 1 or self._num_steps % FULL_INTERVAL == 0:
            gc.collect()
        elif self._num_steps % YOUNG_INTERVAL == 0:
            gc.collect(generation=1)

    def __exit__(self, *error: object) -> None:
        if self._was_enabled:
            gc.enable()
