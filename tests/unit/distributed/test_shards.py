"""Distribution of rows over ranks."""

import pytest
import torch

from switchtitan.distributed.shards import rows_per_rank


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(12, 4), (13, 4), (3, 4), (1, 1), (17, 5)])
def test_rows_per_rank_equal_those_of_torch_chunk(num_rows: int, num_ranks: int):
    first = torch.empty(num_rows, 2).chunk(num_ranks)[0]
    assert rows_per_rank(num_rows, num_ranks) == len(first)
