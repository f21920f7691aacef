"""Owners are balanced; on one rank, matrices of one shape form a batch. Ranks: see
tests/distributed/test_muon_ranks.py."""

import pytest
import torch

from switchtitan.distributed.matrix_exchange import MatrixExchange, balanced_owners


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 50])
def test_owners_share_the_cost(num_ranks):
    costs = [float(1 + place % 7 + 10 * (place % 3 == 0)) for place in range(41)]
    owners = balanced_owners(costs, num_ranks)
    loads = [0.0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    lower_bound = max(sum(costs) / num_ranks, max(costs))
    assert max(loads) <= 4 / 3 * lower_bound
    # Shows that the check above can fail: a round-robin gives some ranks most of the large ones.
    if num_ranks == 3:
        dealt = [sum(costs[first::num_ranks]) for first in range(num_ranks)]
        assert max(dealt) > 4 / 3 * lower_bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_batches_matrices_of_one_shape(dtype):
    shapes = [(3, 5), (4, 2), (3, 5), (5, 3)]
    matrices = [torch.randn(shape) for shape in shapes]
    exchange = MatrixExchange(matrices, [1.0] * len(matrices), dtype)
    batches = exchange.collect(matrices)
    expected = {
        (2, 3, 5): torch.stack([matrices[0], matrices[2]]),
        (1, 4, 2): matrices[1][None],
        (1, 5, 3): matrices[3][None],
    }
    assert len(batches) == len(expected)
    for batch in batches:
        assert batch.dtype == dtype
        assert torch.equal(batch, expected[tuple(batch.shape)].to(dtype))
    for matrix, part in zip(matrices, exchange.distribute(batches), strict=True):
        assert torch.equal(part, matrix.to(dtype))
