"""What a run does around its steps besides training, evaluating and saving."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import nn

from switchtitan.observability import Reporter


class Hook(Protocol):
    """Something that a run does around its steps. All ranks call all methods in the same order."""

    def around(self, step: int) -> AbstractContextManager[None]:
        """Returns a context for step `step`, counted from 1. Called again if the update was
        skipped."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether to call `after` when `step` steps are done."""
        ...

    def after(self, step: int) -> None:
        """Does the hook's work after step `step`.

        All gradients have been finite so far. Throughput does not include the time.
        """
        ...

    def results(self) -> dict[str, float | None]:
        """Returns the hook's values in `results.json`, by tag."""
        ...


class InspectWeights:
    """A hook that inspects the weights after every `interval`-th step and after the last one.

    Args:
        inspect: (model, step, reporter) -> None; reports on the weights.
        interval: in steps.
        num_steps: length of the run.
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
