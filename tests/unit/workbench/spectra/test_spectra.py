"""Ranks of matrices with a known spectrum."""

import pytest
import torch

from switchtitan.workbench.spectra.weight_change import (
    effective_rank,
    mean_normalized_spectrum,
    singular_values,
)


@pytest.mark.parametrize("shape", [(5, 7), (11, 6), (8, 8)])
def test_singular_values_equal_those_of_svd(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = singular_values(matrix)
    assert values.shape == (min(shape),)
    # fp64, then one rounding to fp32.
    expected = torch.linalg.svdvals(matrix.double()).float()
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)


def test_effective_ranks_match_a_hand_calculation():
    assert effective_rank(torch.tensor([2.5, 2.5, 2.5])) == pytest.approx(3)
    # Shares 1/2, 1/4, 1/4: the entropy is 1.5 log 2.
    for scale in (1, 100):
        assert effective_rank(scale * torch.tensor([2.0, 1.0, 1.0, 0.0])) == pytest.approx(2**1.5)
    unchanged = singular_values(torch.zeros(4, 6))
    assert effective_rank(unchanged) == 0


def test_the_mean_spectrum_is_of_shares_of_each_layer_s_largest_value():
    spectra = {
        "0.q": torch.tensor([4.0, 2.0, 1.0]),
        "0.up": torch.zeros(2),
        "1.q": torch.tensor([0.5, 0.25, 0.0]),
    }
    # Shorter and unchanged layers count as zero.
    mean = mean_normalized_spectrum(spectra)
    torch.testing.assert_close(mean, torch.tensor([2, 1, 0.25]) / 3, rtol=1e-6, atol=0)
