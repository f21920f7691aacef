"""Costs of SwitchLoRA's switches in a training run."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from switchtitan.benchmark.counters import CountOperations
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS, Update, mark_steps_side_by_side
from switchtitan.benchmark.step_times import Ratio, ratio_of_rounds
from switchtitan.contracts import TrainingOptimizer
from switchtitan.errors import ConfigError
from switchtitan.job.config import JobConfig
from switchtitan.methods.switchlora import SwitchLoraConfig
from switchtitan.methods.switchlora.optimizer import SwitchLoraOptimizer
from switchtitan.observability.collectives import CountCommunication

_NEVER = 1e18
"""A switching interval longer than any run."""


@dataclass(frozen=True)
class SwitchCosts:
    """Costs of switches on this rank; arrays [rounds, steps], in seconds."""

    step_s: NDArray[np.float64]
    """Full training steps."""
    switch_s: NDArray[np.float64]
    """The switches in them, including preparation of the next step's switches."""
    step_without_s: NDArray[np.float64]
    """Full steps of the same run without switches. They still include planning, an exchange of no
    rows (a collective on several ranks) and preparation."""
    num_vectors: float
    """Vectors of A and B switched in all layers in the last warm-up step."""
    num_operations: int
    """Operations of the switches in that step; see `CountOperations`."""
    num_collectives: int
    """Collectives of the switches in that step."""

    @property
    def median_s(self) -> float:
        """The median switch."""
        return float(np.median(self.switch_s))

    @property
    def percentile_99_s(self) -> float:
        """The 99th percentile over all steps."""
        return float(np.quantile(self.switch_s, 0.99))

    @property
    def median_step_s(self) -> float:
        """The median training step."""
        return float(np.median(self.step_s))

    @property
    def share(self) -> float:
        """The median over steps of the switch's share of the step."""
        return float(np.median(self.switch_s / self.step_s))

    @property
    def ratio_to_without(self) -> Ratio:
        """The ratio of `step_s` to `step_without_s`."""
        return ratio_of_rounds(self.step_s, self.step_without_s)


def time_switches_side_by_side(
    configs: Mapping[str, JobConfig], rounds: int, steps_per_round: int
) -> dict[str, SwitchCosts]:
    """Times switches inside training steps, and the same runs without switches, in alternation.

    See `time_steps_side_by_side`.

    Raises:
        ConfigError: if a configuration's method is not SwitchLoRA, or it has fewer steps than are
            timed, or they differ in a key that holds for the process.
        UserError: if a stepper cannot be built, or skips an update.
    """
    updates: dict[str, _MarkedSwitches] = {}
    sides: dict[str, tuple[JobConfig, Update]] = {}
    for name, config in configs.items():
        method = config.method
        if not isinstance(method, SwitchLoraConfig):
            raise ConfigError(
                f"{name}: [method] name = {method.name!r}: has no switches; set it to 'switchlora'"
            )
        rarely = method.model_copy(update={"interval": _NEVER, "switches_per_vector": None})
        never = config.model_copy(update={"method": rarely})
        updates[name] = _MarkedSwitches()
        sides[name] = config, updates[name]
        sides[_without(name)] = never, _MarkedSwitches()
    times = mark_steps_side_by_side(sides, rounds, steps_per_round)
    return {
        name: SwitchCosts(
            step_s=times[name].sum(axis=2),
            switch_s=times[name][:, :, _SWITCH],
            step_without_s=times[_without(name)].sum(axis=2),
            num_vectors=update.num_vectors,
            num_operations=update.num_operations,
            num_collectives=update.num_collectives,
        )
        for name, update in updates.items()
    }


_SWITCH = 1
"""Index of the switch among the intervals between marks; interval 0 is forward and backward."""


class _MarkedSwitches:
    """Updates weights, marks start and end of switches, and counts those of the last warm-up step.

    Attributes:
        num_vectors: vectors switched in that step.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._operations, self._communication = CountOperations(), CountCommunication()
        self.num_vectors = 0.0

    @property
    def num_operations(self) -> int:
        return self._operations.num_operations

    @property
    def num_collectives(self) -> int:
        return sum(count.num_calls for count in self._communication.counts.values())

    def __call__(self, optimizer: TrainingOptimizer, mark: Callable[[], None]) -> None:
        assert isinstance(optimizer, SwitchLoraOptimizer)
        self._num_steps += 1
        is_counted = self._num_steps == WARM_UP_STEPS
        mark()
        with (
            self._communication if is_counted else nullcontext(),
            self._operations if is_counted else nullcontext(),
        ):
            optimizer.switch()
        mark()
        optimizer.update()
        if is_counted:
            self.num_vectors = optimizer.metrics()["switch/vectors_switched"]


def _without(name: str) -> str:
    return f"{name} without switches"
