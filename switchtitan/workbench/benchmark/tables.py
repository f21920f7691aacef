"""Measurements as tables and as JSON records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from switchtitan.distributed.gpus import card_of
from switchtitan.job.config import JobConfig
from switchtitan.workbench.benchmark.estimate import MAX_BATCH_SIZE, Fit, StepEstimate
from switchtitan.workbench.benchmark.gpu.record import StepOnGpu, bounds_s, costs_by
from switchtitan.workbench.benchmark.memory_tracker import KINDS, STATE
from switchtitan.workbench.benchmark.step_times import ratio_of_steps

_MIB, _GIB = 2**20, 2**30
_NUM_OPERATIONS = 20
"""Lines of the operations with the highest bounds."""


def step_table(record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Formats one line per configuration of a `step_record`; ratios are to the first."""
    rows = [("ms/step", "tokens/s", "ratio", "95 % interval", "")]
    for name, of in record.items():
        speed = _four_digits(1e3 * of["step_s"]), tqdm.format_sizeof(of["tokens_per_s"])
        ratio = of["ratio"]
        interval = f"{ratio['low']:.3f}-{ratio['high']:.3f}" if len(rows) > 1 else ""
        rows.append((*speed, f"{ratio['value']:.3f}", interval, name))
    return _aligned(rows)


def slope_table(slopes: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Formats one line per configuration: the exponent of the change of each layer."""
    names = dict.fromkeys(name for of in slopes.values() for name in of)
    lines = [
        (*(f"{of[name]:+.2f}" if name in of else "" for name in names), config)
        for config, of in slopes.items()
    ]
    return _aligned([(*names, ""), *lines])


def step_record(
    times: Mapping[str, NDArray], configs: Mapping[str, JobConfig]
) -> dict[str, dict[str, Any]]:
    """Returns by configuration: seconds of a step, the median over rounds and in each round, and
    the ratio to the first one, with its 95 % interval."""
    reference_s = next(iter(times.values()))
    return {
        name: {
            "step_s": (median_s := float(np.median(step_s))),
            "tokens_per_s": _tokens_per_step(configs[name]) / median_s,
            "rounds_s": step_s.tolist(),
            "ratio": ratio_of_steps(step_s, reference_s),
        }
        for name, step_s in times.items()
    }


def estimate_tables(
    estimates: Mapping[str, StepEstimate], configs: Mapping[str, JobConfig], num_ranks: int
) -> list[str]:
    """Formats four tables with a line for each configuration, of memory two: sizes, memory, bytes
    that are sent by the collectives that occur, operations."""
    first = next(iter(estimates.values()))
    counts = [estimate.communication for estimate in estimates.values()]
    used = [kind for kind in first.communication if any(of[kind].num_calls for of in counts)]
    sizes = [(*first.parameters, "steps", "tokens", "checkpoint GiB", "")]
    memory = [("GiB", "total", "state", *KINDS, "")]
    sent: list[tuple[str, ...]] = [("MiB/step", *used, "")]
    operations: list[tuple[str, ...]] = [
        ("TFLOP/step", "to update", "update", "full rank", "ratio", "")
    ]
    for name, of in estimates.items():
        steps = configs[name].training.steps
        values = [f"{number:,}" for number in (*of.parameters.values(), steps)]
        num_tokens = tqdm.format_sizeof(steps * _tokens_per_step(configs[name]))
        sizes.append((*values, num_tokens, _four_digits(of.checkpoint_bytes / _GIB), name))
        use = of.memory
        at_peak, most = ([_gib(of[kind]) for kind in KINDS] for of in (use.at_peak, use.most))
        state = sum(use.at_peak[kind] for kind in STATE)
        memory.append(("peak", _gib(use.peak), _gib(state), *at_peak, name))
        memory.append(("most", "", _gib(use.state), *most, ""))
        calls = [of.communication[kind] for kind in used]
        cells = [f"{count.bytes_sent / _MIB:.2f} ({count.num_calls})" for count in calls]
        total = sum(count.bytes_sent for count in calls)
        sent.append((f"{total / _MIB:.2f}", *cells, name))
        flops = of.forward_backward_flops, of.update_flops, of.full_rank_flops
        figures = [_four_digits(number / 1e12) for number in (sum(flops[:2]), *flops)]
        operations.append((*figures, f"{of.flops_ratio:.3f}", name))
    return [
        "values that train, that are frozen and in buffers; the run; a checkpoint",
        *_aligned(sizes),
        f"memory of each of {num_ranks} ranks in a step: the peak, and each kind's maximum",
        *_aligned(memory),
        *(f"  {kind}: {meaning}" for kind, meaning in KINDS.items()),
        "sent by each rank in a step with ring algorithms, in MiB (number of collectives)",
        *_aligned(sent),
        "floating-point operations of each rank in a step",
        *_aligned(operations),
    ]


def fit_table(fits: Mapping[str, Fit]) -> list[str]:
    """Formats one line per configuration: the largest micro-batch that fits in each memory, and the
    peak with one sequence."""
    memories_gib = next(iter(fits.values())).batch_size
    rows = [(*(f"in {gib} GiB" for gib in memories_gib), "peak with 1, GiB", "")]
    for name, fit in fits.items():
        special = {0: "no", MAX_BATCH_SIZE: f"{MAX_BATCH_SIZE}+"}  # none; all that are tried
        cells = [special.get(size, str(size)) for size in fit.batch_size.values()]
        rows.append((*cells, _gib(fit.peak[1]), name))
    return _aligned(rows)


def estimate_record(estimates: Mapping[str, StepEstimate]) -> dict[str, Any]:
    """Returns all figures of the tables by configuration, in bytes and FLOPs."""
    return {
        name: asdict(estimate)
        | {
            "communication": {kind: n._asdict() for kind, n in estimate.communication.items()},
            "flops_ratio": estimate.flops_ratio,
        }
        for name, estimate in estimates.items()
    }


def bound_table(steps: Mapping[str, Mapping[str, StepOnGpu]]) -> list[str]:
    """Formats one line per configuration: the bound on each card, and its ratio to the first."""
    reference = bounds_s(next(iter(steps.values())))
    rows: list[tuple[str, ...]] = [(*(word for name in reference for word in (name, "ratio")), "")]
    for name, by_arch in steps.items():
        row: list[str] = []
        for card, seconds in bounds_s(by_arch).items():
            row += [_four_digits(1e3 * seconds), f"{seconds / reference[card]:.3f}"]
        rows.append((*row, name))
    return _aligned(rows)


def launch_table(arch: str, step: StepOnGpu, *keys: str) -> list[str]:
    """Formats the costs of launches by some of their attributes, the highest bounds first, and
    their sum."""
    costs = costs_by(step.launches, card_of(arch), *keys)
    largest = sorted(costs.items(), key=lambda entry: entry[1].seconds, reverse=True)
    total = costs_by(step.launches, card_of(arch))[()]
    rows: list[tuple[str, ...]] = [("launches", "GB", "TFLOP", "ms", "")]
    for key, cost in (*largest[:_NUM_OPERATIONS], (("all",), total)):
        figures = cost.num_bytes / 1e9, cost.num_flops / 1e12, 1e3 * cost.seconds
        rows.append((str(cost.num_launches), *map(_four_digits, figures), " ".join(key)))
    return _aligned(rows)


def gpu_record(steps: Mapping[str, Mapping[str, StepOnGpu]]) -> dict[str, Any]:
    """Returns by configuration: the bound on each card, and by architecture all launches and
    compilations."""
    return {
        name: {
            "bounds_s": bounds_s(by_arch),
            **{
                arch: {
                    **step._asdict(),
                    "launches": [{**launch._asdict(), "times": n} for launch, n in step.launches],
                    "total": vars(costs_by(step.launches, card_of(arch))[()]),
                }
                for arch, step in by_arch.items()
            },
        }
        for name, by_arch in steps.items()
    }


def _tokens_per_step(config: JobConfig) -> int:
    return config.training.global_batch_size * config.data.seq_len


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f}"


def _four_digits(value: float) -> str:
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Aligns columns right, but the last one left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]
