"""Times training steps of several configurations in alternation in one process."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import numpy as np
import torch

from switchtitan.benchmark.step_times import StepTimes
from switchtitan.benchmark.steppers import real_stepper
from switchtitan.benchmark.timing import Stopwatch, alternate
from switchtitan.config.toml_text import toml_value
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.world import temporary_world
from switchtitan.errors import ConfigError, UserError
from switchtitan.job.config import JobConfig
from switchtitan.training.hooks import GarbageCollection
from switchtitan.training.step import Stepper

WARM_UP_STEPS = 3
"""Untimed steps of each configuration: they compile, allocate and fill caches."""
_PROCESS_KEYS = ("tf32", "deterministic")
"""Keys of `[training]` that set torch's behavior for the process."""
_RECOMPILE_LIMIT = 256
"""Graphs that torch.compile may keep per function. The default, 8, suits one model; here several
share their functions."""

Update = Callable[[TrainingOptimizer, Callable[[], None]], None]
"""Updates the weights with an optimizer, and calls the given function at each mark, equally often
in every step."""


def time_steps_side_by_side(
    configs: Mapping[str, JobConfig], rounds: int, steps_per_round: int
) -> dict[str, StepTimes]:
    """Times training steps of several configurations: each round runs `steps_per_round` of each.

    Every second round reverses their order, since the first may be slower or faster for being
    first. All models are in memory at once. Nothing is evaluated, saved or reported. Collective
    over all ranks.

    Args:
        configs: by any name.

    Returns:
        This rank's times by the same names, from step `WARM_UP_STEPS` + 1 on.

    Raises:
        ConfigError: if a configuration has fewer steps than are timed, or they differ in a key that
            holds for the process.
        UserError: if a stepper cannot be built, or skips an update.
        torch._dynamo.exc.RecompileError: if a timed step compiles, which invalidates its time.
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
    """Like `time_steps_side_by_side`, for the intervals between marks.

    Args:
        sides: a configuration, and an update that sets marks.

    Returns:
        Seconds of each interval by the same names, [rounds, steps, intervals]: from the start of a
        step to its first mark, and so on to its end.
    """
    assert rounds >= 1
    assert steps_per_round >= 1
    configs = {name: config for name, (config, _) in sides.items()}
    _check_lengths(configs, WARM_UP_STEPS + rounds * steps_per_round)
    _check_process_keys(configs)
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
    """The stepper of one configuration, and a stopwatch."""

    def __init__(self, name: str, stepper: Stepper, update: Update) -> None:
        self.name = name
        self.stepper = stepper
        self._update = update
        self._stopwatch = Stopwatch(stepper.world.device)

    def run(self, num_steps: int) -> np.ndarray:
        """Runs steps; returns seconds between marks, [steps, intervals].

        Raises:
            UserError: if an update is skipped.
        """
        self.stepper.world.synchronize()
        for _ in range(num_steps):
            self._stopwatch.mark()
            result = self.stepper.compute_gradients()
            if result.is_skipped:
                raise UserError(
                    f"{self.name}: step {self.stepper.state.step} cannot be timed: its update was "
                    "skipped, since gradients were not finite and [training] on_nonfinite = "
                    "'skip'; lower [optimizer] lr"
                )
            # As `Stepper.update` does.
            with full_precision():
                self._update(self.stepper.optimizer, self._stopwatch.mark)
            self.stepper.finish_step(result)
            self._stopwatch.mark()
        intervals = np.array([*self._stopwatch.intervals_s(), 0.0])
        # The interval after a step's last mark is not part of the step.
        return intervals.reshape(num_steps, -1)[:, :-1]


def _time(benches: Mapping[str, Bench], rounds: int, steps_per_round: int) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in benches}
    # As in training, garbage collection does not run inside a step, but between turns, untimed.
    with GarbageCollection() as garbage:
        # In turns too: compiling one configuration may invalidate torch's cache for another.
        for _ in range(WARM_UP_STEPS):
            for bench in benches.values():
                bench.run(1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for index in range(rounds):
                for bench in alternate(list(benches.values()), index):
                    garbage.step()
                    parts[bench.name].append(bench.run(steps_per_round))
    return {name: np.stack(rounds_of_one) for name, rounds_of_one in parts.items()}


def _step_times(parts: np.ndarray, tokens_per_step: int) -> StepTimes:
    """Converts seconds before, in and after the update, [rounds, steps, 3]."""
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
                f"{num_steps}: {WARM_UP_STEPS} warm-up steps and the timed ones; increase it, or "
                "time fewer rounds or steps"
            )


def _check_process_keys(configs: Mapping[str, JobConfig]) -> None:
    for key in _PROCESS_KEYS:
        values = {name: getattr(config.training, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{toml_value(value)} in {name}" for name, value in values.items())
            raise ConfigError(
                f"[training] {key} = {found}: expected one value, since it holds for the "
                "process, in which all are timed; time them in separate runs"
            )
