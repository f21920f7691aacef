"""Ranks of matrices with a known spectrum."""

import math

import pytest
import torch

from switchtitan.errors import ConfigError
from switchtitan.spectra.spectrum import (
    effective_rank,
    layers_by_kind,
    mean_normalized_spectrum,
    normalized_by_kind,
    numerical_rank,
    select_layers,
    singular_values,
    summarize,
)


def matrix_with(values: list[float], num_rows: int, num_columns: int) -> torch.Tensor:
    """Returns a matrix with these singular values, zeros otherwise, in random orthonormal bases."""
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64))[0]
        for size in (num_rows, num_columns)
    )
    return (left * torch.tensor(values, dtype=torch.float64) @ right.T).float()


@pytest.mark.parametrize("shape", [(5, 7), (11, 6), (8, 8)])
def test_singular_values_equal_those_of_svd(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = singular_values(matrix)
    assert values.shape == (min(shape),)
    # fp64, then one rounding to fp32.
    torch.testing.assert_close(
        values, torch.linalg.svdvals(matrix.double()).float(), rtol=1e-6, atol=0
    )


def test_effective_rank_of_the_identity_is_its_size() -> None:
    assert effective_rank(singular_values(torch.eye(9))) == pytest.approx(9)
    assert numerical_rank(singular_values(torch.eye(9))) == 9


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    values = singular_values(matrix_with([2.5] * rank, 13, 7))
    # The zeros are fp32 roundings of about 1e-7 in the matrix, in the entropy times their log.
    assert effective_rank(values) == pytest.approx(rank, rel=2e-5)
    assert numerical_rank(values) == rank


def test_effective_rank_of_unequal_singular_values_matches_a_hand_calculation() -> None:
    # Shares 1/2, 1/4, 1/4: the entropy is 1.5 log 2.
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0, 0.0])) == pytest.approx(2**1.5)
    assert effective_rank(torch.tensor([200.0, 100.0, 100.0, 0.0])) == pytest.approx(2**1.5)


def test_an_unchanged_weight_has_rank_zero() -> None:
    values = singular_values(torch.zeros(4, 6))
    assert effective_rank(values) == 0
    assert numerical_rank(values) == 0


def test_numerical_rank_counts_values_above_one_percent_of_the_largest() -> None:
    assert numerical_rank(torch.tensor([3.0, 0.5, 0.031, 0.029, 0.0])) == 3


def test_summary_averages_over_layers_and_kinds() -> None:
    spectra = {
        "model.layers.0.self_attn.q_proj": torch.ones(4),
        "model.layers.0.mlp.up_proj": torch.tensor([1.0, 0.0]),
        "model.layers.1.self_attn.q_proj": torch.tensor([5.0, 5.0, 0.0, 0.0]),
    }
    summary = summarize(spectra)
    assert summary.effective == pytest.approx((4 + 1 + 2) / 3)
    assert summary.numerical == pytest.approx((4 + 1 + 2) / 3)
    assert summary.effective_by_kind == pytest.approx({"q_proj": 3.0, "up_proj": 1.0})
    assert summary.effective_by_layer == pytest.approx(dict(zip(spectra, (4, 1, 2), strict=True)))
    assert list(layers_by_kind(spectra)) == ["q_proj", "up_proj"]


def test_mean_spectrum_counts_shorter_and_unchanged_layers_as_zero() -> None:
    spectra = {
        "a": torch.tensor([4.0, 2.0, 1.0]),
        "b": torch.tensor([3.0, 3.0]),
        "c": torch.zeros(3),
    }
    torch.testing.assert_close(
        mean_normalized_spectrum(spectra),
        torch.tensor([2 / 3, 1.5 / 3, 0.25 / 3]),
        rtol=1e-6,
        atol=0,
    )


def test_layers_of_a_kind_are_normalized_one_by_one() -> None:
    spectra = {
        "0.q": torch.tensor([4.0, 2.0, 1.0]),
        "0.up": torch.zeros(2),
        "1.q": torch.tensor([0.5, 0.25, 0.0]),
    }
    by_kind = normalized_by_kind(spectra)
    # Powers of two: no rounding.
    assert {kind: shares.tolist() for kind, shares in by_kind.items()} == {
        "q": [1, 0.5, 0.25, 1, 0.5, 0],
        "up": [0, 0],
    }


def test_layers_are_selected_by_kind_or_name() -> None:
    names = [f"model.layers.{index}.mlp.{kind}" for index in (0, 1) for kind in ("up", "down")]
    assert select_layers(names, ["*"]) == names
    assert select_layers(names, ["up"]) == ["model.layers.0.mlp.up", "model.layers.1.mlp.up"]
    assert select_layers(names, ["*.1.*"]) == ["model.layers.1.mlp.up", "model.layers.1.mlp.down"]
    with pytest.raises(
        ConfigError, match="--layers side: matches no layer; expected one of up, down"
    ):
        select_layers(names, ["up", "side"])


def test_effective_rank_lies_between_one_and_the_number_of_values() -> None:
    values = torch.rand(17, generator=torch.Generator().manual_seed(2))
    assert 1 < effective_rank(values) < 17
    assert math.isclose(effective_rank(values), effective_rank(torch.cat([values, torch.zeros(5)])))
