"""Stochastic rounding is unbiased, and its bits depend on an element's place only."""

import math

import pytest
import torch
from torch import Tensor

from switchtitan.distributed.rounding import random_bits, round_to_bf16

ALL_BITS = torch.arange(2**16, dtype=torch.int32)


def key(number: int) -> Tensor:
    return torch.tensor(number, dtype=torch.int32)


@pytest.mark.parametrize(
    "value", [1.0 + 2**-9, -0.3, 1e-3, -7.7e5, 3.1e38, 2.0**-129 + 2.0**-140, 0.0, -2.5]
)
def test_over_all_bits_the_mean_is_exact_and_only_neighbours_come_up(value: float) -> None:
    values = torch.full((2**16,), value)
    rounded = round_to_bf16(values, ALL_BITS)
    assert rounded.dtype == torch.bfloat16
    # fp64 holds the sum of so many bf16 values of like size.
    assert rounded.double().mean() == values[0].double()
    exact = values[0].double().abs()
    seen = rounded.double().abs().unique()
    assert len(seen) == (1 if exact == exact.bfloat16().double() else 2)
    assert seen[0] <= exact <= seen[-1]
    if len(seen) == 2:
        between = torch.nextafter(seen[0].bfloat16(), torch.tensor(math.inf, dtype=torch.bfloat16))
        assert between.double() == seen[1]


def not_finite() -> Tensor:
    """Both infinities; then nan as CUDA makes it, with its sign set, and as the CPU makes it."""
    patterns = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000]
    return (
        torch.tensor([pattern - (pattern >> 31 << 32) for pattern in patterns])
        .int()
        .view(torch.float32)
    )


@pytest.mark.parametrize("bits", [0, 1, 2**15, 2**16 - 1])
def test_what_is_not_finite_stays_so(bits: int) -> None:
    rounded = round_to_bf16(not_finite(), torch.full((5,), bits, dtype=torch.int32))
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()


def chi_square_per_degree(counts: Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return (((counts - expected) ** 2 / expected).sum() / (counts.numel() - 1)).item()


def test_bits_are_uniform_and_independent_of_their_neighbours() -> None:
    bits = random_bits(key(12345), 0, 512, 1024)
    assert bits.min() >= 0
    assert bits.max() < 2**16
    assert bits.dtype == torch.int32
    other = random_bits(key(12346), 0, 512, 1024)
    pairs = {
        "halves": (bits, bits % 256),
        "rows": (bits[1:], bits[:-1] >> 8),
        "columns": (bits[:, 1:], bits[:, :-1] >> 8),
        "second columns": (bits[:, 2:], bits[:, :-2] >> 8),
        "diagonals": (bits[1:, 1:], bits[:-1, :-1] >> 8),
        "events": (bits, other >> 8),
    }
    for name, (first, second) in pairs.items():
        counts = torch.bincount(((first >> 8) * 256 + second).flatten(), minlength=2**16).double()
        # Some 2^16 degrees of freedom: the deviation is 0.0055; five of them.
        assert chi_square_per_degree(counts) == pytest.approx(1, abs=0.028), name
    for part in range(16):
        ones = ((bits >> part) & 1).double().mean().item()
        assert ones == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(bits.numel())), part


def test_a_part_of_the_rows_gets_the_bits_of_the_whole() -> None:
    full = random_bits(key(-7), 0, 11, 5)
    assert torch.equal(random_bits(key(-7), 4, 3, 5), full[4:7])
    assert random_bits(key(-7), 11, 0, 5).shape == (0, 5)
