"""Progress bars for work that may take more than a few seconds."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY_S = 3.0
"""Shorter work has no bar."""


def progress_bar(
    description: str, items: Iterable[Any] | None = None, *, total: float | None, unit: str
) -> "tqdm[Any]":
    """Returns a bar on standard error, which is removed at its end; `update` advances it.

    Draws nothing if standard error is not a terminal, and on all ranks but the first.

    Args:
        items: if given, iterating over the bar yields them and advances it.
        total: what the bar counts up to.
        unit: of what is counted, e.g. `"tensors"`; "B" counts bytes.
    """
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit if unit == "B" else f" {unit}",
        unit_scale=unit == "B",
        unit_divisor=1024 if unit == "B" else 1000,
        delay=DELAY_S,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not is_drawn(),
    )


@contextmanager
def slow_note(text: str, delay_s: float = DELAY_S) -> Iterator[None]:
    """Prints `text` on standard error, where a bar would be drawn, if the work inside is not done
    after `delay_s`: for work whose length is not known."""
    timer = threading.Timer(delay_s, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    if is_drawn():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_drawn() -> bool:
    """Whether progress is shown: on a terminal, by the first rank."""
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
