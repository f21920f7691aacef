"""Training steps of several configurations, timed in alternation in one process."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np
import torch

from switchtitan.benchmark.step_times import StepTimes
from switchtitan.benchmark.steppers import real_stepper
from switchtitan.benchmark.timing import Stopwatch, in_order_of_round
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.world import temporary_world
from switchtitan.errors import ConfigError, UserError
from switchtitan.job.config import JobConfig
from switchtitan.training.garbage_collection import GarbageCollection
from switchtitan.training.stepper import Stepper

WARM_UP_STEPS = 3
"""Steps of each configuration before the timed ones: they compile, allocate, and fill caches."""
_RECOMPILE_LIMIT = 256
"""Graphs that torch.compile may keep for one function; the default, 8, is meant for one model, and
here several share their functions."""

Update = Callable[[TrainingOptimizer, Callable[[], None]], None]
"""What updates the weights with an optimizer, and calls the function that it is given at each mark,
equally often in every step."""


def time_steps_side_by_side(
    configs: Mapping[str, JobConfig], rounds: int, steps_per_round: int
) -> dict[str, StepTimes]:
    """Times training steps of several configurations: in each round, `steps_per_round` steps of
    each in turn.

    Every second round goes through them in reverse, since what runs first may be slower or faster
    for being first. All models are in memory at once. The data are the configurations' own; nothing
    is evaluated, saved or reported. Every rank of a run on several ranks calls it alike.

    Args:
        configs: by a name of the caller's choice.

    Returns:
        This rank's times by the same names, from step `WARM_UP_STEPS` + 1 on.

    Raises:
        ConfigError: if a configuration's run is shorter than what is to be timed.
        UserError: if a stepper cannot be built, or skips an update.
        torch._dynamo.exc.RecompileError: if a timed step had to compile, so that its time would say
            nothing.
    """
    sides = {name: (config, _update) for name, config in configs.items()}
    parts = mark_steps_side_by_side(sides, rounds, steps_per_round)
    return {
        name: _step_times(parts[name], config.training.global_batch_size * config.data.seq_len)
        for name, config in configs.items()
    }


def _update(optimizer: TrainingOptimizer, mark: Callable[[], None]) -> None:
    mark()
    optimizer.step()
    mark()


def mark_steps_side_by_side(
    sides: Mapping[str, tuple[JobConfig, Update]], rounds: int, steps_per_round: int
) -> dict[str, np.ndarray]:
    """As `time_steps_side_by_side`, of the stretches between marks.

    Args:
        sides: a configuration, and what updates its weights with marks.

    Returns:
        Seconds of each stretch by the same names, [rounds, steps, stretches]: from a step's
        beginning to its first mark, and so on to its end.
    """
    assert rounds >= 1
    assert steps_per_round >= 1
    _check_lengths(
        {name: config for name, (config, _) in sides.items()},
        WARM_UP_STEPS + rounds * steps_per_round,
    )
    with (
        temporary_world(),
        ExitStack() as contexts,
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
    ):
        benches = {
            name: Bench(name, contexts.enter_context(real_stepper(config)), update)
            for name, (config, update) in sides.items()
        }
        return _time(benches, rounds, steps_per_round)


class Bench:
    """The stepper of one configuration under the stopwatch."""

    def __init__(self, name: str, stepper: Stepper, update: Update) -> None:
        self.name = name
        self.stepper = stepper
        self._update = update
        self._stopwatch = Stopwatch(stepper.world.device)

    def run(self, num_steps: int) -> np.ndarray:
        """Takes steps; returns seconds between marks, [steps, stretches].

        Raises:
            UserError: if an update was skipped.
        """
        self.stepper.world.synchronize()
        for _ in range(num_steps):
            self._stopwatch.mark()
            result = self.stepper.compute_gradients()
            if result.is_skipped:
                raise UserError(
                    f"{self.name}: a step without an update cannot be timed, and step "
                    f"{self.stepper.state.step} was skipped, "
                    'since its gradients were not finite and [training] on_nonfinite = "skip"; '
                    "lower [optimizer] lr"
                )
            self._update(self.stepper.optimizer, self._stopwatch.mark)
            self.stepper.finish_step(result)
            self._stopwatch.mark()
        intervals = np.array([*self._stopwatch.intervals_s(), 0.0])
        # What follows a step's last mark is no part of it.
        return intervals.reshape(num_steps, -1)[:, :-1]


def _time(benches: Mapping[str, Bench], rounds: int, steps_per_round: int) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in benches}
    # As in training, nothing is collected in the middle of a step; here it is between turns, which
    # is not timed.
    with GarbageCollection() as garbage:
        # In turns too: what one configuration compiles may make torch look for the graphs of
        # another one again.
        for _ in range(WARM_UP_STEPS):
            for bench in benches.values():
                bench.run(1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for index in range(rounds):
                for bench in in_order_of_round(list(benches.values()), index):
                    garbage.step()
                    parts[bench.name].append(bench.run(steps_per_round))
    return {name: np.stack(of_side) for name, of_side in parts.items()}


def _step_times(parts: np.ndarray, tokens_per_step: int) -> StepTimes:
    """From seconds to the update, of the update, and after it, [rounds, steps, 3]."""
    return StepTimes(
        step_s=parts.sum(axis=2),
        forward_backward_s=parts[:, :, 0],
        optimizer_s=parts[:, :, 1],
        tokens_per_step=tokens_per_step,
    )


def _check_lengths(configs: Mapping[str, JobConfig], num_steps: int) -> None:
    for name, config in configs.items():
        if config.training.steps < num_steps:
            raise ConfigError(
                f"{name}: [training] steps = {config.training.steps}: expected at least "
                f"{num_steps}, the {WARM_UP_STEPS} steps "
                "of warm-up and those to be timed; raise it, or time fewer rounds or steps"
            )
