"""Progress bars for work that may take more than a few seconds."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

DELAY_S = 3.0
"""Shorter work has no bar."""


def progress_bar(
    description: str, items: Iterable[Any] | None = None, *, total: float | None, unit: str
) -> "tqdm[Any]":
    """Returns a bar on standard error, which is removed at its end; `update` advances it.

    Draws nothing if standard error is not a terminal (`disable=None`), and on other ranks.

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
        disable=os.environ.get("RANK", "0") != "0" or None,
    )
