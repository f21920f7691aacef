"""Measurements as tables for people and as records for programs."""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from switchtitan.benchmark.step_times import StepTimes, ratio_of_steps
from switchtitan.distributed.communication import CommunicationCounts
from switchtitan.observability.console import format_count

_MIB = 2**20


def step_table(times: Mapping[str, StepTimes]) -> list[str]:
    """One line for each configuration; the first is what ratios refer to."""
    rows = [("ms/step", "quartiles", "to update", "update", "tokens/s", "ratio", "95 % interval", "")]
    reference = next(iter(times.values()))
    for name, of_side in times.items():
        low, high = of_side.quartiles_s
        ratio = ratio_of_steps(of_side, reference)
        is_reference = of_side is reference
        rows.append(
            (
                _milliseconds(of_side.median_s),
                f"{_milliseconds(low)}-{_milliseconds(high)}",
                _milliseconds(float(np.median(of_side.forward_backward_s))),
                _milliseconds(float(np.median(of_side.optimizer_s))),
                format_count(of_side.tokens_per_s),
                "1" if is_reference else f"{ratio.value:.3f}",
                "" if is_reference else f"{ratio.low:.3f}-{ratio.high:.3f}",
                name,
            )
        )
    return _aligned(rows)


def step_record(times: Mapping[str, StepTimes]) -> dict[str, JsonValue]:
    """By configuration: medians and quartiles over all steps, the median of each round, and the ratio to the first one."""
    reference = next(iter(times.values()))
    record: dict[str, JsonValue] = {}
    for name, of_side in times.items():
        ratio = ratio_of_steps(of_side, reference)
        record[name] = {
            "step_s": of_side.median_s,
            "step_quartiles_s": list(of_side.quartiles_s),
            "forward_backward_s": float(np.median(of_side.forward_backward_s)),
            "optimizer_s": float(np.median(of_side.optimizer_s)),
            "tokens_per_s": of_side.tokens_per_s,
            "round_medians_s": np.median(of_side.step_s, axis=1).tolist(),
            "ratio": ratio.value,
            "ratio_interval_95": [ratio.low, ratio.high],
        }
    return record


def communication_table(counts: Mapping[str, CommunicationCounts]) -> list[str]:
    """For each configuration, what each rank sends in a step, by collective, in MiB, and the number of collectives."""
    happened = [
        kind for kind in next(iter(counts.values())) if any(c[kind].num_calls for c in counts.values())
    ]
    rows = [("MiB/step", *happened, "")]
    for name, of_side in counts.items():
        total = sum(count.bytes_sent for count in of_side.values())
        cells = [f"{of_side[kind].bytes_sent / _MIB:.2f} ({of_side[kind].num_calls})" for kind in happened]
        rows.append((f"{total / _MIB:.2f}", *cells, name))
    return _aligned(rows)


def communication_record(counts: Mapping[str, CommunicationCounts]) -> dict[str, JsonValue]:
    """By configuration and collective: number of calls, and bytes that each rank sends in a ring."""
    return {
        name: {
            kind: {"num_calls": count.num_calls, "bytes_sent": count.bytes_sent}
            for kind, count in of_side.items()
        }
        for name, of_side in counts.items()
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns flush right, but the last, which may be long, flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [*(cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)), row[-1]]
        ).rstrip()
        for row in rows
    ]
