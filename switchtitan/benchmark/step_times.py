"""Times training steps of several configurations in alternation in one process."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from switchtitan.benchmark.steppers import real_stepper
from switchtitan.config import toml_value
from switchtitan.distributed.world import temporary_world
from switchtitan.errors import ConfigError, UserError
from switchtitan.job.config import JobConfig
from switchtitan.training.step import GarbageCollection, Stepper

WARM_UP_STEPS = 3
"""Untimed steps of each configuration: they compile, allocate and fill caches."""
_NUM_RESAMPLES = 2000
_PROCESS_KEYS = ("tf32", "deterministic")
"""Keys of `[training]` that set torch's behavior for the process."""
_RECOMPILE_LIMIT = 256
"""Graphs that torch.compile may keep per function. The default, 8, suits one model; here several
share their functions."""


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one configuration's training steps on this rank; all arrays [rounds, steps]."""

    step_s: NDArray[np.float64]
    """Full steps, including reading the batch."""
    forward_backward_s: NDArray[np.float64]
    """From the start of the step to its update: batch, forward, backward and clipping."""
    optimizer_s: NDArray[np.float64]
    """The optimizer's update, including the method's work in it, such as switches."""
    tokens_per_step: int
    """Tokens of the global batch, over all ranks."""

    @property
    def median_s(self) -> float:
        """The median over all steps."""
        return float(np.median(self.step_s))

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """The first and the third quartile over all steps."""
        low, high = np.quantile(self.step_s, [0.25, 0.75])
        return float(low), float(high)

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the median step."""
        return self.tokens_per_step / self.median_s


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two sides."""

    value: float
    low: float
    """Lower end of the 95 % bootstrap interval; `high` is the upper end."""
    high: float


def ratio_of_steps(times: StepTimes, reference: StepTimes) -> Ratio:
    """Returns the median over rounds of (median of a round) / (median of the reference's round).

    Rounds are compared pairwise, so that a slowdown longer than a round affects both. The interval
    is the percentile bootstrap over rounds (Efron 1979), from 2000 resamples with a fixed seed; it
    is rough for few rounds.
    """
    ratios = np.median(times.step_s, axis=1) / np.median(reference.step_s, axis=1)
    draws = np.random.default_rng(0).integers(len(ratios), size=(_NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


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
    _check_lengths(configs, WARM_UP_STEPS + rounds * steps_per_round)
    _check_process_keys(configs)
    with (
        temporary_world(),
        ExitStack() as contexts,
        torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
    ):
        benches = {
            name: Bench(name, contexts.enter_context(real_stepper(config)))
            for name, config in configs.items()
        }
        parts = _time(benches, rounds, steps_per_round)
    return {
        name: _step_times(parts[name], config.training.global_batch_size * config.data.seq_len)
        for name, config in configs.items()
    }


class Bench:
    """The stepper of one configuration, and a stopwatch."""

    def __init__(self, name: str, stepper: Stepper) -> None:
        self.name = name
        self.stepper = stepper
        self._stopwatch = Stopwatch(stepper.world.device)

    def run(self, num_steps: int) -> NDArray[np.float64]:
        """Runs steps; returns seconds before, in and after the update, [steps, 3].

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
            self._stopwatch.mark()
            self.stepper.update()
            self._stopwatch.mark()
            self.stepper.finish_step(result)
            self._stopwatch.mark()
        intervals = np.array([*self._stopwatch.intervals_s(), 0.0])
        # The interval after a step's last mark is not part of the step.
        return intervals.reshape(num_steps, -1)[:, :-1]


class Stopwatch:
    """Records times at marks; on CUDA, the times at which the device reaches them.

    On CUDA it records events: waiting for the device at each mark would keep the host from running
    ahead, and slow down the measured code.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host_s: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Marks the end of all work queued so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._host_s.append(time.perf_counter())

    def intervals_s(self) -> list[float]:
        """Returns seconds between consecutive marks; waits for the device and clears the marks."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            intervals = [start.elapsed_time(end) / 1e3 for start, end in pairs]
        else:
            intervals = np.diff(self._host_s).tolist()
        self._host_s, self._events = [], []
        return intervals


def _time(
    benches: Mapping[str, Bench], rounds: int, steps_per_round: int
) -> dict[str, NDArray[np.float64]]:
    parts: dict[str, list[NDArray[np.float64]]] = {name: [] for name in benches}
    # As in training, garbage collection does not run inside a step, but between turns, untimed.
    with GarbageCollection() as garbage:
        # In turns too: compiling one configuration may invalidate torch's cache for another.
        for _ in range(WARM_UP_STEPS):
            for bench in benches.values():
                bench.run(1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for index in range(rounds):
                in_turn = list(benches.values())
                for bench in reversed(in_turn) if index % 2 else in_turn:
                    garbage.step()
                    parts[bench.name].append(bench.run(steps_per_round))
    return {name: np.stack(rounds_of_one) for name, rounds_of_one in parts.items()}


def _step_times(parts: NDArray[np.float64], tokens_per_step: int) -> StepTimes:
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
