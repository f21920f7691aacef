"""The numbers of ranks on which tests of sharding train, and how they are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.ranks import run_on_ranks

# In running order.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "two": (2, ()),
    "one": (1, ()),
    "four": (4, ()),
    "two_by_two": (4, ("--parallelism.replicate", "2")),
}
"""Name -> number of ranks, and arguments of the run."""
RELATIVE_LOSS_TOLERANCE = 1e-5
"""Sums over ranks have another order; Adam amplifies that for gradients near zero, Muon for
singular values near zero."""


def run_in_layouts(folder: Path, train: Callable[[int, Path, str], None]) -> dict[str, Any]:
    """Calls `train(rank, folder, layout)` on the ranks of each layout.

    Args:
        folder: is created; `train` saves its results as `<layout>.pt` in it.

    Returns:
        the results, by layout.
    """
    folder.mkdir()
    for layout, (num_ranks, _) in LAYOUTS.items():
        run_on_ranks(num_ranks, train, folder, layout)
    return {layout: torch.load(folder / f"{layout}.pt") for layout in LAYOUTS}
