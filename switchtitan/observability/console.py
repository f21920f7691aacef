"""Metrics as lines of at most 80 columns."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

CONSOLE_WIDTH = 80
_HEADER_INTERVAL = 20
"""Rows between two headers, so that any part of a log is readable."""


def perplexity_of(loss: float) -> float:
    """Returns exp(loss), capped at exp(700), which fits in float64."""
    return math.exp(min(loss, 700.0))


def format_count(value: float) -> str:
    """Formats with three digits and a unit: 0.05, 7, 123, 1.23k, 45.6M."""
    if not math.isfinite(value):
        return str(value)
    units = ["", "k", "M", "G", "T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:.3g}{units[0]}"


def format_duration(seconds: float) -> str:
    """Formats with the two largest units: 45s, 3m07s, 2h05m, 4d11h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days}d{rest_h:02d}h"
    if hours:
        return f"{hours}h{rest_min:02d}m"
    return f"{minutes}m{rest_s:02d}s" if minutes else f"{rest_s}s"


def _by_size(limit: float, small: str, large: str) -> Callable[[float], str]:
    """Returns a function that formats numbers below `limit` with `small`, others with `large`."""
    return lambda value: format(value, small if abs(value) < limit else large)


class _Column(NamedTuple):
    tag: str
    title: str
    width: int
    format: Callable[[float], str]
    is_always_shown: bool = False


_COLUMNS = (
    _Column("loss/train", "loss", 8, _by_size(1000, ".4f", ".1e")),
    _Column("optimizer/lr", "lr", 8, "{:.2e}".format),
    _Column("optimizer/grad_norm", "grad norm", 9, _by_size(100, ".3f", ".1e")),
    _Column("throughput/tokens_per_s", "tokens/s", 8, format_count, True),
    _Column("throughput/tflop_per_s_per_device", "TFLOP/s", 7, _by_size(10, ".3f", ".1f"), True),
    _Column("throughput/mfu", "MFU", 6, "{:.1%}".format),
    _Column("memory/peak_gib", "GiB", 5, _by_size(10, ".2f", ".1f")),
    _Column("throughput/eta_s", "ETA", 6, format_duration, True),
)


class ConsoleTable:
    """One row per report, under a header that is repeated.

    Args:
        num_steps: total training steps.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._columns: list[_Column] = []
        self._rows_since_header = 0

    def lines(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns the lines to print for `values` by tag; ignores tags without a column."""
        progress = f"{step}/{self._num_steps}".rjust(max(2 * len(str(self._num_steps)) + 1, 4))
        lines = []
        if "loss/train" in values:
            columns = [c for c in _COLUMNS if c.is_always_shown or c.tag in values]
            if columns != self._columns or self._rows_since_header >= _HEADER_INTERVAL:
                self._columns, self._rows_since_header = columns, 0
                titles = [c.title.rjust(c.width) for c in columns]
                lines.append(" ".join(["step".rjust(len(progress)), *titles]))
            cells = [c.format(values[c.tag]) if c.tag in values else "-" for c in columns]
            padded = [cell.rjust(c.width) for cell, c in zip(cells, columns, strict=True)]
            lines.append(" ".join([progress, *padded]))
            self._rows_since_header += 1
        for split in ("validation", "test"):
            if (loss := values.get(f"loss/{split}")) is not None:
                perplexity = perplexity_of(loss)
                lines.append(f"{progress} {split} loss {loss:.4f}, perplexity {perplexity:.2f}")
        return lines


def format_summary(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Formats names and values as a block between two rules."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * CONSOLE_WIDTH
    return [rule, *(f"{name.ljust(width)}  {value}" for name, value in rows), rule]
