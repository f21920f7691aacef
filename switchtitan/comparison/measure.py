"""What is measured of methods rather than of runs: step times side by side, and bytes that a step communicates."""

import json
import logging
import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch

from switchtitan.atomic_file import write_atomically
from switchtitan.benchmark.communication import communication_of_a_step
from switchtitan.benchmark.side_by_side import WARM_UP_STEPS, time_steps_side_by_side
from switchtitan.benchmark.step_times import ratio_of_steps
from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, plan_run
from switchtitan.config import ConfigError

MEASUREMENTS_FILE = "measurements.json"
ROUNDS, STEPS_PER_ROUND = 8, 5

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measurements:
    """Figures of one row."""

    step_s: float
    """The median step, seconds, timed beside the baseline's on the same machine."""
    step_ratio: float
    """To the baseline's, the median over rounds."""
    step_ratio_low: float
    """With `step_ratio_high`, its 95 % interval."""
    step_ratio_high: float
    bytes_per_step: float
    """That each rank sends, see `distributed.communication`."""


def measure(comparison: ComparisonConfig, folder: Path, num_threads: int) -> dict[str, Measurements]:
    """Measures every row, or reads what an earlier call wrote to `folder`.

    A row stands still beside the baseline only; both trade places every few steps, so that a noisy machine slows both alike.
    """
    file = folder / MEASUREMENTS_FILE
    known = read_measurements(folder)
    for row in comparison.rows:
        if row.name not in known:
            known[row.name] = _measure_row(comparison, row.name, num_threads)
            folder.mkdir(parents=True, exist_ok=True)
            table = {name: asdict(figures) for name, figures in known.items()}
            write_atomically(file, json.dumps(table, indent=2) + "\n")
    return known


def read_measurements(folder: Path) -> dict[str, Measurements]:
    """What `measure` wrote, by row; empty if it did not."""
    file = folder / MEASUREMENTS_FILE
    if not file.exists():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {name: Measurements(**figures) for name, figures in table.items()}


def _measure_row(comparison: ComparisonConfig, name: str, num_threads: int) -> Measurements:
    run, baseline = (
        plan_run(comparison, comparison.row(row), 1e-3, comparison.selection_seed)
        for row in (name, comparison.baseline)
    )
    step_s, ratio = _in_own_process(_time_steps, {"row": run, "baseline": baseline}, num_threads)
    sent = _in_own_process(_count_bytes, run, comparison.communication_ranks)
    return Measurements(step_s, ratio[0], ratio[1], ratio[2], sent)


def _time_steps(runs: Mapping[str, Run], num_threads: int) -> tuple[float, tuple[float, float, float]]:
    # What the two runs say of themselves is no news.
    logging.disable(logging.WARNING)
    torch.set_num_threads(num_threads)
    configs = {name: run.config() for name, run in runs.items()}
    num_timed = configs["row"].training.steps - WARM_UP_STEPS
    rounds = min(ROUNDS, num_timed // STEPS_PER_ROUND)
    if rounds < 1:
        raise ConfigError(
            f"[training] steps = {configs['row'].training.steps}: expected at least {WARM_UP_STEPS + STEPS_PER_ROUND}, which "
            "timing a step takes"
        )
    times = time_steps_side_by_side(configs, rounds, STEPS_PER_ROUND)
    ratio = ratio_of_steps(times["row"], times["baseline"])
    return times["row"].median_s, (ratio.value, ratio.low, ratio.high)


def _count_bytes(run: Run, num_ranks: int) -> float:
    config = run.config(num_ranks)
    return sum(count.bytes_sent for count in communication_of_a_step(config, num_ranks).values())


def _in_own_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Both measurements make process groups of their own, which this process must not be in."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
