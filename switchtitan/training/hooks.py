"""What a run does around its steps besides training, evaluating and saving."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from switchtitan.observability import Reporter


class Hook(Protocol):
    """Something that a run does around some of its steps, of which the trainer knows no more than
    this.

    All ranks call all methods alike.
    """

    def around(self, step: int) -> AbstractContextManager[None]:
        """A context in which step `step`, counted from 1, is taken; taken again if its update was
        skipped."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether `after` is to be called, when `step` steps are done."""
        ...

    def after(self, step: int) -> None:
        """Does its work. The time does not count for the speed of training; gradients have been
        finite so far."""
        ...

    def results(self) -> dict[str, float | None]:
        """What `results.json` keeps of it, by tag."""
        ...


class InspectWeights:
    """A hook that looks at the weights in every `interval`-th step and after the last one.

    Args:
        inspect: reports what it finds in the weights, given the model, the step and where to
            report.
        num_steps: at which training ends.
    """

    def __init__(
        self,
        inspect: Callable[[nn.Module, int, Reporter], None],
        model: nn.Module,
        reporter: Reporter,
        *,
        interval: int,
        num_steps: int,
    ) -> None:
        self._inspect = inspect
        self._model = model
        self._reporter = reporter
        self._interval = interval
        self._num_steps = num_steps

    def around(self, step: int) -> AbstractContextManager[None]:
        return nullcontext()

    def is_due(self, step: int) -> bool:
        return step == self._num_steps or step % self._interval == 0

    def after(self, step: int) -> None:
        self._inspect(self._model, step, self._reporter)

    def results(self) -> dict[str, float | None]:
        return {}
