"""Distribution of rows over ranks, and padding of exchanges."""

import pytest
import torch

from switchtitan.distributed.shards import padded_length, rows_per_rank


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(12, 4), (13, 4), (3, 4), (1, 1), (17, 5)])
def test_rows_per_rank_equal_those_of_torch_chunk(num_rows: int, num_ranks: int):
    first = torch.empty(num_rows, 2).chunk(num_ranks)[0]
    assert rows_per_rank(num_rows, num_ranks) == len(first)


def test_padding_adds_at_most_an_eighth():
    lengths = [2**14 + 1, 99_999, 2**20, 2**20 + 1, 2**24 - 1, 2**24 + 1, 13_000_001]
    for length in lengths:
        assert length <= padded_length(length) < length * 1.125
    assert len({padded_length(length) for length in range(100_000, 200_000, 7)}) <= 18


def test_similar_lengths_mostly_have_the_same_padded_length():
    pairs = [(length, length + length // 1000) for length in range(20_000, 400_000, 777)]
    num_equal = sum(padded_length(first) == padded_length(second) for first, second in pairs)
    assert num_equal / len(pairs) > 0.95
    assert padded_length(2) == padded_length(900)
