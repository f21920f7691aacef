"""The log: handlers for the console and a file, and metrics as lines of at most 80 columns."""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from switchtitan.errors import discard_output

_HEADER_INTERVAL = 20
"""Rows between two headers, so that any part of a log is readable."""


def configure_logging(*, is_main: bool, rank: int = 0, log_file: Path | None = None) -> None:
    """Sends this package's records and other packages' warnings to standard output.

    Replaces the handlers of earlier calls, and of the command's start.

    Args:
        is_main: print records from INFO up; other ranks print warnings only, with their rank.
        log_file: the main rank also appends all records with timestamps to this file, and creates
            its folder.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        is_own = isinstance(handler, _ConsoleHandler | _LogFileHandler)
        if is_own or handler.name == "switchtitan":
            root.removeHandler(handler)
            handler.close()
    root.addHandler(_ConsoleHandler("" if is_main else f"[rank {rank}] "))
    if is_main and log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        root.addHandler(_LogFileHandler(log_file))
    root.setLevel(logging.WARNING)
    logging.getLogger("switchtitan").setLevel(logging.INFO if is_main else logging.WARNING)


class _ConsoleHandler(logging.Handler):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        try:
            severity = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
            # Redraws a progress bar below the line.
            tqdm.write(f"{self._prefix}{severity}{self.format(record)}", file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()
            message = "warning: standard output was closed; the log continues in the log file only"
            print(message, file=sys.stderr)
        except Exception:
            # As logging's own handlers: a failed record must not end the program.
            self.handleError(record)


class _LogFileHandler(logging.FileHandler):
    """Says once that lines cannot be written; logging's own handlers print a traceback for each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not self._has_failed:
            self._has_failed = True
            message = f"could not write to {self.baseFilename} ({sys.exc_info()[1]})"
            tqdm.write(f"warning: {message}; lines may be missing", file=sys.stdout)

    def close(self) -> None:
        with suppress(OSError):  # what is still buffered
            super().close()


def perplexity_of(loss: float) -> float:
    """Returns exp(loss), capped at exp(700), which fits in float64."""
    return math.exp(min(loss, 700.0))


class _Column(NamedTuple):
    tag: str
    title: str
    width: int
    format: Callable[[float], str]


_COLUMNS = (
    _Column("loss/train", "loss", 8, "{:.4f}".format),
    _Column("optimizer/lr", "lr", 8, "{:.2e}".format),
    _Column("optimizer/grad_norm", "grad norm", 9, "{:.3f}".format),
    _Column("throughput/tokens_per_s", "tokens/s", 8, tqdm.format_sizeof),
    _Column("throughput/tflop_per_s_per_device", "TFLOP/s", 7, "{:.3f}".format),
    _Column("throughput/mfu", "MFU", 6, "{:.1%}".format),
    _Column("memory/peak_gib", "GiB", 5, "{:.2f}".format),
    _Column("throughput/eta_s", "ETA", 8, tqdm.format_interval),
)


class ConsoleTable:
    """One row per report of a run of `num_steps` steps, under a header that is repeated."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._columns: list[_Column] = []
        self._rows_since_header = 0

    def lines(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Returns the lines to print for `values` by tag; ignores tags without a column."""
        progress = f"{step}/{self._num_steps}".rjust(max(2 * len(str(self._num_steps)) + 1, 4))
        lines = []
        if "loss/train" in values:
            columns = [c for c in _COLUMNS if c.title != "MFU" or c.tag in values]
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
