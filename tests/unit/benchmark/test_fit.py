"""The largest micro-batch that fits in a memory."""

from collections.abc import Callable

import pytest
from support.tiny import tiny_config

from switchtitan.benchmark import fit
from switchtitan.benchmark.estimate import estimate_step
from switchtitan.benchmark.fit import MAX_BATCH_SIZE, USABLE_SHARE, BatchSizeSearch, peak_bytes
from switchtitan.benchmark.tables import batch_size_cell

GIB = 2**30
PEAKS: dict[str, Callable[[int], int]] = {
    "linear": lambda size: GIB * (100 + 10 * size),
    "convex": lambda size: GIB * max(400, 100 + 20 * size),
    "concave": lambda size: GIB * min(100 + 30 * size, 700 + size),
    "steps": lambda size: GIB * (100 + 50 * (size // 7)),
}


@pytest.mark.parametrize("shape", PEAKS)
def test_the_largest_size_is_that_of_trying_all(shape, tmp_path, monkeypatch):
    peak = PEAKS[shape]
    estimated = []

    def estimate(config: object, num_ranks: int, batch_size: int) -> int:
        assert num_ranks == 3
        estimated.append(batch_size)
        return peak(batch_size)

    monkeypatch.setattr(fit, "peak_bytes", estimate)
    search = BatchSizeSearch(tiny_config(tmp_path, "full_rank"), num_ranks=3)
    for usable_gib in range(90, 1000, 10):
        fitting = [n for n in range(1, MAX_BATCH_SIZE + 1) if peak(n) <= usable_gib * GIB]
        # A millionth more than rounding can lose.
        memory_gib = (usable_gib + 1e-6) / USABLE_SHARE
        assert search.largest(memory_gib) == max(fitting, default=0), usable_gib
    assert len(estimated) == len(set(estimated)), "a size was estimated twice"


def test_few_estimates_suffice_where_peaks_are_almost_linear(tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "peak_bytes", lambda config, ranks, size: PEAKS["linear"](size))
    search = BatchSizeSearch(tiny_config(tmp_path, "full_rank"), num_ranks=1)
    assert search.largest(455 / USABLE_SHARE) == 35
    assert len(search.peaks) <= 4
    untried = BatchSizeSearch(search.config, num_ranks=1)
    assert untried.largest(100 / USABLE_SHARE) == 0
    assert set(untried.peaks) == {1}


@pytest.mark.parametrize("method", ["full_rank", "galore", "switchlora"])
def test_the_peak_is_that_of_a_step_with_two_such_micro_batches(tmp_path, method):
    config = tiny_config(tmp_path, method)
    keys = ("--training.local_batch_size", "5", "--training.global_batch_size", "10")
    same = tiny_config(tmp_path, method, *keys)
    assert same.training.local_batch_size != config.training.local_batch_size
    assert peak_bytes(config, 1, batch_size=5) == estimate_step(same, 1).memory.peak
    assert peak_bytes(config, 1, batch_size=6) > peak_bytes(config, 1, batch_size=5)


@pytest.mark.parametrize(
    ("size", "cell"), [(0, "no"), (1, "1"), (63, "63"), (MAX_BATCH_SIZE, "64+")]
)
def test_cells_claim_nothing_beyond_the_largest_size(size, cell):
    assert batch_size_cell(size) == cell
