"""The largest micro-batch that fits in a memory."""

from collections.abc import Callable

import pytest
from support.tiny import tiny_config

from switchtitan.benchmark.estimate import estimate_step
from switchtitan.benchmark.fit import (
    MAX_BATCH_SIZE,
    USABLE_SHARE,
    largest_batch_size,
    largest_batch_sizes,
)
from switchtitan.benchmark.tables import batch_size_cell

GIB = 2**30
PEAKS: dict[str, Callable[[int], int]] = {
    "linear": lambda size: GIB * (100 + 10 * size),
    "convex": lambda size: GIB * max(400, 100 + 20 * size),
    "concave": lambda size: GIB * min(100 + 30 * size, 700 + size),
    "steps": lambda size: GIB * (100 + 50 * (size // 7)),
}


@pytest.mark.parametrize("shape", PEAKS)
def test_the_largest_size_is_that_of_trying_all(shape):
    peak = PEAKS[shape]
    for limit_gib in range(90, 1000, 10):
        limit = limit_gib * GIB
        fitting = [n for n in range(1, MAX_BATCH_SIZE + 1) if peak(n) <= limit]
        assert largest_batch_size(peak, limit) == max(fitting, default=0), limit_gib


@pytest.mark.parametrize(("limit_gib", "largest", "most"), [(455, 35, 4), (100, 0, 1)])
def test_few_estimates_suffice_where_peaks_are_almost_linear(limit_gib, largest, most):
    tried = []

    def peak(size: int) -> int:
        tried.append(size)
        return PEAKS["linear"](size)

    assert largest_batch_size(peak, limit_gib * GIB) == largest
    assert len(tried) == len(set(tried)) <= most


@pytest.mark.parametrize("method", ["full_rank", "galore", "switchlora"])
def test_peaks_are_those_of_a_step_with_two_such_micro_batches(tmp_path, method):
    """They are measured in one run, whose batches change their size."""
    kept = ("--parallelism.reshard_after_forward", "false")
    memory_gib = 0.003
    fit = largest_batch_sizes(tiny_config(tmp_path, method, *kept), 1, [memory_gib, 1e-6])
    largest = fit.batch_sizes[memory_gib]
    assert fit.batch_sizes[1e-6] == 0
    assert 1 < largest < MAX_BATCH_SIZE
    assert {1, largest, largest + 1, MAX_BATCH_SIZE} <= set(fit.peaks)
    assert fit.peaks[largest] <= USABLE_SHARE * memory_gib * GIB < fit.peaks[largest + 1]
    for size, peak in fit.peaks.items():
        keys = ("--training.local_batch_size", f"{size}", "--training.global_batch_size")
        same = tiny_config(tmp_path, method, *keys, f"{2 * size}", *kept)
        assert peak == estimate_step(same, 1).memory.peak


@pytest.mark.parametrize(
    ("size", "cell"), [(0, "no"), (1, "1"), (63, "63"), (MAX_BATCH_SIZE, "64+")]
)
def test_cells_claim_nothing_beyond_the_largest_size(size, cell):
    assert batch_size_cell(size) == cell
