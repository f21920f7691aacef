"""When a run resets, and how the learning rate recovers: integers only."""

import torch
from torch import Tensor


class ResetSchedule:
    """Counts a run's steps and resets.

    A reset follows every `interval`-th step except the last of the run. (ReLoRA, arXiv 2307.05695, Algorithm 1.)

    Args:
        interval: steps between two resets.
        warmup_steps: over which the learning rate recovers from one.
        num_steps: length of the run.

    Attributes:
        num_resets: so far.
    """

    def __init__(self, interval: int, warmup_steps: int, num_steps: int) -> None:
        self._interval, self._warmup_steps, self._num_steps = interval, warmup_steps, num_steps
        self._steps_done = 0
        self.num_resets = 0
        # Not derived from the number of steps: a run that is made longer has no reset where it first ended.
        self._last_reset_step = 0

    def lr_factor(self) -> float:
        """The factor on the learning rate at the coming step: (steps since the reset + 1) / warmup_steps, at most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a reset has a rate of zero;
        here, as in the warm-up at the start of a run, it has the first rate above zero, so that no step is spent on nothing.
        """
        if self.num_resets == 0:
            return 1.0
        return min(1.0, (self._steps_done - self._last_reset_step + 1) / max(1, self._warmup_steps))

    def advance(self) -> bool:
        """Counts a step; returns whether a reset follows, and counts that too."""
        self._steps_done += 1
        if self._steps_done % self._interval or self._steps_done >= self._num_steps:
            return False
        self.num_resets += 1
        self._last_reset_step = self._steps_done
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """0-dim int64 tensors."""
        return {
            "steps_done": torch.tensor(self._steps_done),
            "num_resets": torch.tensor(self.num_resets),
            "last_reset_step": torch.tensor(self._last_reset_step),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps_done = int(state["steps_done"])
        self.num_resets = int(state["num_resets"])
        self._last_reset_step = int(state["last_reset_step"])
