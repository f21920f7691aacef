"""Measures methods outside their runs: step times side by side, and bytes sent in a step."""

import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from switchtitan.benchmark.estimate import communication_of_a_step
from switchtitan.benchmark.step_times import (
    WARM_UP_STEPS,
    ratio_of_steps,
    time_steps_side_by_side,
)
from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import Run, first_run
from switchtitan.comparison.runner import num_threads
from switchtitan.config.toml_text import resolved_toml
from switchtitan.files import write_atomically

logger = logging.getLogger(__name__)

MEASUREMENTS_FILE = "measurements.json"
ROUNDS, STEPS_PER_ROUND = 8, 5
_TERMINATION_S = 30


class MeasurementFailedError(Exception):
    """A measurement ended without a result."""


@dataclass(frozen=True)
class Measurements:
    """Measurements of one row, from steps early in a run."""

    step_s: float
    """Median step time, timed alternately with the baseline on the same machine."""
    step_ratio: float
    """Step time divided by the baseline's: the median over rounds."""
    step_ratio_low: float
    """Lower end of the 95 % interval of `step_ratio`."""
    step_ratio_high: float
    """Upper end of the interval."""
    bytes_per_step: float
    """Bytes that each rank sends; see `distributed.count_collectives`."""
    fingerprint: str
    """Checksum of the configurations of the row and the baseline, and the numbers of ranks and
    rounds."""


def measure(comparison: ComparisonConfig, folder: Path) -> None:
    """Measures every row that has no measurement of its current configuration in `folder`.

    Times each row together with the baseline, in turns of a few steps, so that noise slows both
    alike. Skips a row that cannot be measured, with a warning: an error would lose the report of
    runs that took hours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for row in comparison.rows:
        run = first_run(comparison, row)
        known = read_measurements(comparison, folder)
        if row.name in known:
            continue
        logger.info("measuring %s", row.name)
        try:
            known[row.name] = _measure_row(comparison, run)
        except MeasurementFailedError as error:
            logger.warning("%s could not be measured: %s", row.name, error)
            continue
        table = {name: asdict(figures) for name, figures in known.items()}
        write_atomically(folder / MEASUREMENTS_FILE, json.dumps(table, indent=2) + "\n")


def read_measurements(comparison: ComparisonConfig, folder: Path) -> dict[str, Measurements]:
    """Returns the measurements of rows' current configurations, by row."""
    file = folder / MEASUREMENTS_FILE
    if not file.exists():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    known = {name: Measurements(**figures) for name, figures in table.items()}
    return {
        row.name: known[row.name]
        for row in comparison.rows
        if row.name in known
        and known[row.name].fingerprint == _fingerprint(comparison, first_run(comparison, row))
    }


def _fingerprint(comparison: ComparisonConfig, run: Run) -> str:
    baseline = first_run(comparison, comparison.row(comparison.baseline))
    contents = [
        resolved_toml(run.config()),
        resolved_toml(baseline.config()),
        comparison.communication_ranks,
        (ROUNDS, STEPS_PER_ROUND),
    ]
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:16]


def _measure_row(comparison: ComparisonConfig, run: Run) -> Measurements:
    baseline = first_run(comparison, comparison.row(comparison.baseline))
    step_s, ratio, low, high = _in_own_process(_time_steps, run, baseline)
    (sent,) = _in_own_process(_count_bytes, run, comparison.communication_ranks)
    return Measurements(step_s, ratio, low, high, sent, _fingerprint(comparison, run))


def _time_steps(run: Run, baseline: Run) -> tuple[float, ...]:
    # Both runs would log their descriptions.
    logging.disable(logging.WARNING)
    torch.set_num_threads(num_threads(1))
    configs = {"row": run.config(), "baseline": baseline.config()}
    num_steps = min(config.training.steps for config in configs.values())
    rounds = min(ROUNDS, (num_steps - WARM_UP_STEPS) // STEPS_PER_ROUND)
    times = time_steps_side_by_side(configs, rounds, STEPS_PER_ROUND)
    ratio = ratio_of_steps(times["row"], times["baseline"])
    return times["row"].median_s, ratio.value, ratio.low, ratio.high


def _count_bytes(run: Run, num_ranks: int) -> tuple[float, ...]:
    counts = communication_of_a_step(run.config_on(num_ranks), num_ranks)
    return (sum(count.bytes_sent for count in counts.values()),)


def _in_own_process(
    function: Callable[..., tuple[float, ...]], *arguments: object
) -> tuple[float, ...]:
    """Calls `function` in a new process, because it creates process groups."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        figures = receiver.recv()
        # The process exits by itself. `finally` handles an interrupted one.
        process.join(_TERMINATION_S)
    except EOFError:
        process.join()
        raise MeasurementFailedError(f"its process exited with {process.exitcode}") from None
    finally:
        if process.is_alive():
            process.terminate()
            process.join(_TERMINATION_S)
            process.kill()
    if isinstance(figures, str):
        raise MeasurementFailedError(figures)
    return figures


def _send_result(
    sender: Connection, function: Callable[..., tuple[float, ...]], arguments: tuple[object, ...]
) -> None:
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")
