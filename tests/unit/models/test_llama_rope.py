"""Rotary embeddings: relative positions, and an independent formula."""

import cmath

import pytest
import torch

from switchtitan.models.llama.rope import Rope, rotary_tables, rotate

CPU = torch.device("cpu")


def test_rotation_equals_multiplication_by_a_complex_unit() -> None:
    head_dim, theta = 6, 500.0
    features = torch.randn(
        1, 1, 5, head_dim, dtype=torch.float32, generator=torch.Generator().manual_seed(0)
    )
    turned = rotate(features, *rotary_tables(5, head_dim, Rope(theta), CPU))
    for position in range(5):
        for pair in range(head_dim // 2):
            first, second = features[0, 0, position, [pair, pair + head_dim // 2]].tolist()
            unit = cmath.exp(1j * position * theta ** (-2 * pair / head_dim))
            expected = complex(first, second) * unit
            actual = complex(*turned[0, 0, position, [pair, pair + head_dim // 2]].tolist())
            assert actual == pytest.approx(expected, abs=1e-6)  # fp32 rounding of angles below 5


def test_scores_depend_only_on_the_distance_of_positions() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 8, generator=generator)
    cos, sin = rotary_tables(11, 8, Rope(10000.0), CPU)
    queries = rotate(query.expand(1, 1, 11, 8), cos, sin)[0, 0]
    keys = rotate(key.expand(1, 1, 11, 8), cos, sin)[0, 0]
    scores = queries @ keys.T
    for distance in range(-5, 6):
        along = scores.diagonal(distance)
        # fp32, |score| ~ 5.
        torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)


def test_rotation_computes_in_fp32_and_keeps_the_dtype() -> None:
    features = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    tables = rotary_tables(7, 4, Rope(10000.0), CPU)
    turned = rotate(features, *tables)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(features.float(), *tables).bfloat16())


def test_linear_scaling_stretches_positions() -> None:
    plain, _ = rotary_tables(6, 8, Rope(700.0), CPU)
    stretched, _ = rotary_tables(11, 8, Rope(700.0, "linear", factor=2.0), CPU)
    torch.testing.assert_close(stretched[::2], plain, atol=1e-6, rtol=0)  # fp32 rounding


def test_llama3_scaling_divides_long_waves_and_keeps_short_ones() -> None:
    rope = Rope(10000.0, "llama3", 8.0, 1.0, 4.0, original_positions=100)
    plain = Rope(10000.0).frequencies(64, CPU)
    ratio = rope.frequencies(64, CPU) / plain
    turns = 100 * plain / (2 * torch.pi)
    assert torch.equal(ratio[turns >= 4], torch.ones(int((turns >= 4).sum())))
    torch.testing.assert_close(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], 1 / 8))
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) >= 3
    assert bool(((between > 1 / 8) & (between < 1)).all())
    assert bool((between.diff() < 0).all())
