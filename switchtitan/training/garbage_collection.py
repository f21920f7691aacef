"""When Python collects its garbage: between steps of training, not in the middle of one."""

import gc

YOUNG_INTERVAL = 50
"""Steps between two collections of what is new: milliseconds."""
FULL_INTERVAL = 1000
"""Steps between two collections of everything."""

_YOUNG, _ALL = 1, 2
"""Generations up to which is collected."""


class GarbageCollection:
    """From the end of the first step until the context is left, garbage is collected in `step` alone.

    By itself Python looks through every object there is now and then. torch.compile leaves so many that a step in which this
    happens takes a quarter of a second longer, and ranks, which wait for each other, do not do it in the same step.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        return self

    def step(self) -> None:
        """Counts one step and collects if it is time."""
        self._num_steps += 1
        if self._num_steps == 1:
            # Not before: processes that read data are started by the first step, and shall collect as they like.
            self._was_enabled = gc.isenabled()
            gc.disable()
        if self._num_steps == 1 or self._num_steps % FULL_INTERVAL == 0:
            gc.collect(_ALL)
        elif self._num_steps % YOUNG_INTERVAL == 0:
            gc.collect(_YOUNG)

    def __exit__(self, *error: object) -> None:
        if self._was_enabled:
            gc.enable()
