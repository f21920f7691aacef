"""Padding of exchanges."""

from switchtitan.distributed.row_exchange import padded_length


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
