import numpy as np
import pytest

from switchtitan.data.sampler import permute, rank_positions, sequence_index


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1023, 5003])
def test_an_epoch_visits_every_sequence_once(size: int) -> None:
    for seed, epoch in [(0, 0), (7, 3)]:
        order = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert sorted(order.tolist()) == list(range(size))


def test_a_position_alone_determines_the_sequence() -> None:
    together = sequence_index(5, np.arange(300), 101)
    one_by_one = [int(sequence_index(5, np.array([position]), 101)[0]) for position in range(300)]
    assert together.tolist() == one_by_one


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [sequence_index(seed, np.arange(303), 101).reshape(3, 101) for seed in (1, 2)]
    distinct = {tuple(epoch) for order in orders for epoch in order.tolist()}
    assert len(distinct) == 6
    # Independent permutations agree in one place on average; the identity is never drawn.
    assert all((np.asarray(epoch) == np.arange(101)).sum() < 10 for epoch in distinct)


@pytest.mark.parametrize("size", [7, 30])
def test_every_sequence_comes_first_about_equally_often(size: int) -> None:
    draws = 200 * size
    firsts = [int(permute(np.array([0]), size, seed=seed, epoch=0)[0]) for seed in range(draws)]
    counts = np.bincount(firsts, minlength=size)
    chi_square = float(((counts - 200) ** 2 / 200).sum())
    # Mean size - 1, standard deviation sqrt(2 (size - 1)); five of them and the seeds are fixed.
    assert chi_square < size - 1 + 5 * np.sqrt(2 * (size - 1))


def test_neighbours_are_separated() -> None:
    order = permute(np.arange(10_007), 10_007, seed=0, epoch=0)
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(correlation) < 0.05  # standard deviation 1 / sqrt(10 007) = 0.01


@pytest.mark.parametrize(
    ("num_ranks", "local_batch_size"), [(1, 12), (1, 4), (2, 3), (4, 1), (3, 2)]
)
def test_ranks_and_micro_batches_hold_the_global_batch_once(
    num_ranks: int, local_batch_size: int
) -> None:
    micro_batches = 12 // (num_ranks * local_batch_size)
    positions = [
        rank_positions(
            3,
            micro_batch,
            global_batch_size=12,
            local_batch_size=local_batch_size,
            rank=rank,
            num_ranks=num_ranks,
        )
        for micro_batch in range(micro_batches)
        for rank in range(num_ranks)
    ]
    assert np.concatenate(positions).tolist() == list(range(36, 48))
