"""Collects Python's garbage between training steps, not inside one."""

import gc

YOUNG_INTERVAL = 50
"""Steps between two collections of the young generations, which take milliseconds."""
FULL_INTERVAL = 1000
"""Steps between two collections of all generations."""

_YOUNG, _ALL = 1, 2
"""The oldest generation that is collected."""


class GarbageCollection:
    """A context in which, from the end of the first step on, garbage is collected in `step` alone.

    Python's collector fires inside a step, at different steps on different ranks, and ranks wait
    for each other. After torch.compile, which leaves many objects, it stalls a step for a quarter of a second.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        return self

    def step(self) -> None:
        """Counts a step, and collects if it is time."""
        self._num_steps += 1
        if self._num_steps == 1:
            # Not before: the first step starts the processes that read data, which keep their own
            # collector.
            self._was_enabled = gc.isenabled()
            gc.disable()
        if self._num_steps == 1 or self._num_steps % FULL_INTERVAL == 0:
            gc.collect(_ALL)
        elif self._num_steps % YOUNG_INTERVAL == 0:
            gc.collect(_YOUNG)

    def __exit__(self, *error: object) -> None:
        if self._was_enabled:
            gc.enable()
