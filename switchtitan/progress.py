"""Progress bars of work that takes long."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    description: str, items: Iterable[Any] | None = None, *, total: float | None, unit: str
) -> "tqdm[Any]":
    """Returns a bar on the first rank's standard error if that is a terminal; removed at its end.

    Args:
        items: iterating over the bar yields them and advances it; else `update` advances it.
        unit: of what is counted, e.g. `"tensors"`; "B" counts bytes.
    """
    is_bytes = unit == "B"
    return tqdm(
        items,
        desc=description,
        total=total,
        unit=unit if is_bytes else f" {unit}",
        unit_scale=is_bytes,
        unit_divisor=1024,
        delay=3.0,  # shorter work has no bar
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=os.environ.get("RANK", "0") != "0" or None,
    )
