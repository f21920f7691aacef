"""When Python collects its garbage: between steps of training, not in the middle of one."""

import gc


class GarbageCollection:
    """From the end of the first step until the context is left, garbage is collected in `step` alone.

    By itself Python now and then looks through every object there is. After torch.compile these are millions, and a step in
    which that happens takes a quarter of a second longer; on several ranks, which wait for each other, it happens in different
    steps. What there is after the first step, compiled code above all, stays to the end of training and is not looked through
    again, so that collecting takes milliseconds.

    Args:
        interval: steps between two collections.
    """

    def __init__(self, interval: int = 50) -> None:
        self._interval = interval
        self._num_steps = 0
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        self._num_steps = 0
        self._was_enabled = gc.isenabled()
        return self

    def step(self) -> None:
        """Counts one step and collects if it is time."""
        self._num_steps += 1
        if self._num_steps == 1:
            # Not before: processes that read data are started by the first step, and shall collect as they like.
            gc.disable()
            gc.collect()
            gc.freeze()
        elif self._num_steps % self._interval == 0:
            gc.collect()

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
