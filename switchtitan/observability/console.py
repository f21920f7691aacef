"""Metrics as lines of at most 80 columns."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

CONSOLE_WIDTH = 80


@dataclass(frozen=True)
class _Column:
    tag: str
    title: str
    width: int
    format: Callable[[float], str]
    is_always_shown: bool = False


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


def _format_loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.1e}"


def _format_norm(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1e}"


def _format_rate(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _format_size(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


_COLUMNS = (
    _Column("loss/train", "loss", 8, _format_loss),
    _Column("optimizer/lr", "lr", 8, lambda value: f"{value:.2e}"),
    _Column("optimizer/grad_norm", "grad norm", 9, _format_norm),
    _Column("throughput/tokens_per_s", "tokens/s", 8, format_count, is_always_shown=True),
    _Column("throughput/tflop_per_s_per_device", "TFLOP/s", 7, _format_rate, is_always_shown=True),
    _Column("throughput/mfu", "MFU", 6, lambda value: f"{value:.1%}"),
    _Column("memory/peak_gib", "GiB", 5, _format_size),
    _Column("throughput/eta_s", "ETA", 6, format_duration, is_always_shown=True),
)


class ConsoleTable:
    """One row per report, under a header that is repeated, so that any part of a log is readable.

    Args:
        num_steps: total training steps.
        header_interval: rows between two headers.
    """

    def __init__(self, num_steps: int, header_interval: int = 20) -> None:
        self._num_steps = num_steps
        self._header_interval = header_interval
        self._columns: tuple[_Column, ...] = ()
        self._rows_since_header = 0

    def lines(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns the lines to print for `values` by tag; ignores tags without a column."""
        progress = f"{step}/{self._num_steps}".rjust(max(2 * len(str(self._num_steps)) + 1, 4))
        lines = []
        columns = tuple(
            column for column in _COLUMNS if column.is_always_shown or column.tag in values
        )
        if "loss/train" in values:
            if columns != self._columns or self._rows_since_header >= self._header_interval:
                self._columns, self._rows_since_header = columns, 0
                lines.append(
                    _join("step".rjust(len(progress)), [c.title.rjust(c.width) for c in columns])
                )
            cells = [
                (c.format(values[c.tag]) if c.tag in values else "-").rjust(c.width)
                for c in columns
            ]
            lines.append(_join(progress, cells))
            self._rows_since_header += 1
        for split in ("validation", "test"):
            if f"loss/{split}" in values:
                loss = values[f"loss/{split}"]
                perplexity = values.get(f"perplexity/{split}", perplexity_of(loss))
                lines.append(f"{progress} {split} loss {loss:.4f}, perplexity {perplexity:.2f}")
        return lines


def format_summary(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Formats names and values as a block between two rules."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * CONSOLE_WIDTH
    return [rule, *(f"{name.ljust(width)}  {value}" for name, value in rows), rule]


def _join(first: str, cells: list[str]) -> str:
    return " ".join([first, *cells])
