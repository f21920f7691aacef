"""Times training steps of several configurations in alternation in one process."""

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch._dynamo.utils import counters

from switchtitan.distributed.world import temporary_world
from switchtitan.errors import ConfigError, UserError
from switchtitan.job.config import JobConfig
from switchtitan.registry import toml_value
from switchtitan.training.step import Stepper
from switchtitan.workbench.benchmark.steppers import real_stepper

WARM_UP_STEPS = 3
"""Untimed steps of each configuration: they compile, allocate and fill caches."""
_RECOMPILE_LIMIT = 256
"""Graphs that torch.compile may keep per function, which several models share here."""


def ratio_of_steps(step_s: NDArray, reference_s: NDArray) -> dict[str, float]:
    """Returns the median over rounds of a round's time divided by that of the reference's round, as
    `value`, and its 95 % interval from `low` to `high`.

    Rounds are compared pairwise, so that a slowdown longer than a round affects both. The interval
    is the percentile bootstrap over rounds (Efron 1979), from 2000 resamples with a fixed seed; it
    is rough for few rounds.

    Args:
        step_s, reference_s: [rounds], of `time_steps_side_by_side`.
    """
    ratios = step_s / reference_s
    draws = np.random.default_rng(0).integers(len(ratios), size=(2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {"value": float(np.median(ratios)), "low": float(low), "high": float(high)}


def time_steps_side_by_side(
    configs: Mapping[str, JobConfig], rounds: int, steps_per_round: int
) -> dict[str, NDArray]:
    """Times training steps of several configurations: each round runs `steps_per_round` of each.

    Every second round reverses their order, since the first may be slower or faster for being
    first. All models are in memory at once. Nothing is evaluated, saved or reported. Collective
    over all ranks.

    Returns:
        By the names of `configs`, [rounds]: mean seconds of a step on this rank, batch included.

    Raises:
        ConfigError: if a configuration has fewer steps than are timed, or they differ in a key that
            holds for the process.
        UserError: if a stepper cannot be built, or skips an update.
    """
    _check(configs, WARM_UP_STEPS + rounds * steps_per_round)
    step_s: dict[str, list[float]] = {name: [] for name in configs}
    with (
        temporary_world(),
        ExitStack() as contexts,
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
    ):
        steppers = {
            name: contexts.enter_context(real_stepper(config)) for name, config in configs.items()
        }
        # In turns too: compiling one configuration may invalidate torch's cache for another.
        for _ in range(WARM_UP_STEPS):
            for name, stepper in steppers.items():
                _take_steps(name, stepper, 1)
        # As in training, Python's collector does not visit what the first steps leave.
        gc.collect()
        gc.freeze()
        contexts.callback(gc.unfreeze)
        for index in range(rounds):
            for name in reversed(steppers) if index % 2 else steppers:
                step_s[name].append(_time(name, steppers[name], steps_per_round))
    return {name: np.array(of) for name, of in step_s.items()}


def _time(name: str, stepper: Stepper, num_steps: int) -> float:
    """Returns the mean seconds of steps in which nothing compiles. Int16 weights compile in a run's
    first switch, which may be late."""
    while True:
        num_graphs = counters["stats"]["unique_graphs"]
        step_s = _take_steps(name, stepper, num_steps)
        if not any(stepper.world.gather(counters["stats"]["unique_graphs"] > num_graphs)):
            return step_s


def _take_steps(name: str, stepper: Stepper, num_steps: int) -> float:
    """Returns the mean seconds of a step, until the device has done all of them."""
    stepper.world.synchronize()
    start_s = time.perf_counter()
    for _ in range(num_steps):
        if stepper.step().is_skipped:
            raise UserError(
                f"{name}: step {stepper.state.step} cannot be timed: its update was skipped, "
                "since gradients were not finite; lower [optimizer] lr"
            )
    stepper.world.synchronize()
    return (time.perf_counter() - start_s) / num_steps


def _check(configs: Mapping[str, JobConfig], num_steps: int) -> None:
    for name, config in configs.items():
        if config.training.steps < num_steps:
            raise ConfigError(
                f"{name}: [training] steps = {config.training.steps}: expected at least "
                f"{num_steps}: {WARM_UP_STEPS} warm-up steps and the timed ones; increase it, or "
                "time fewer rounds or steps"
            )
    for key in ("tf32", "deterministic"):  # they set torch's behavior for the process
        values = {name: getattr(config.training, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            found = ", ".join(f"{toml_value(value)} in {name}" for name, value in values.items())
            raise ConfigError(
                f"[training] {key} = {found}: expected one value, since it holds for the "
                "process, in which all are timed; time them in separate runs"
            )
