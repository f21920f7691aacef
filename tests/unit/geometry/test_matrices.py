"""Numbers of matrices against closed forms."""

import math

import pytest
import torch

from switchtitan.geometry.matrices import MatrixGeometry, matrix_geometry, mean_geometry
from switchtitan.spectra.spectrum import singular_values

# Square roots of eigenvalues in fp64, rounded to fp32.
ROUNDING = 1e-6


def rotated(values: list[float], num_columns: int) -> torch.Tensor:
    """A matrix with the given singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
        for size in (len(values), num_columns)
    )
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[: len(values)]


def test_numbers_of_a_matrix_with_known_singular_values():
    values = [4.0, 3.0, 1.0, 0.05, 0.03]  # the last is below 1 % of 4
    found = matrix_geometry(singular_values(rotated(values, 7)), reference_norm=10.0)
    shares = [value / sum(values) for value in values]
    effective = math.exp(-sum(share * math.log(share) for share in shares))
    squares = sum(value**2 for value in values)
    expected = MatrixGeometry(
        rank=4,
        effective_rank=effective,
        effective_rank_ratio=effective / 5,
        stable_rank=squares / 16,
        spectral_gap=0.25,
        norm=math.sqrt(squares),
        relative_norm=math.sqrt(squares) / 10,
    )
    assert found == pytest.approx(expected, rel=ROUNDING)
    # Numbers that only the scale changes.
    larger = matrix_geometry(singular_values(2 * rotated(values, 7)), reference_norm=10.0)
    assert larger[:5] == pytest.approx(found[:5], rel=ROUNDING)
    assert larger[5:] == pytest.approx([2 * number for number in found[5:]], rel=ROUNDING)


def test_all_ranks_of_equal_singular_values_are_the_number_of_values():
    found = matrix_geometry(torch.full((6,), 0.3))
    assert found == pytest.approx((6, 6, 1, 6, 0, 0.3 * 6**0.5, 1), rel=ROUNDING, abs=1e-12)


def test_all_ranks_of_an_outer_product_are_one():
    product = torch.outer(torch.arange(1.0, 6.0), torch.arange(2.0, 5.0))
    found = matrix_geometry(singular_values(product))
    # Squares lose half the digits, so that "zeros" are about 1e-8 of the largest.
    assert found[:5] == pytest.approx((1, 1, 1 / 3, 1, 1), abs=1e-6)
    assert found.norm == pytest.approx(product.norm().item(), rel=ROUNDING)


def test_a_column_has_a_gap_and_a_zero_matrix_has_zeros():
    assert matrix_geometry(torch.tensor([2.0])) == (1, 1, 1, 1, 1, 2, 1)
    assert set(matrix_geometry(torch.zeros(4), reference_norm=1.0)) == {0.0}


def test_the_mean_is_over_matrices():
    one, three = (matrix_geometry(torch.full((size,), 1.0)) for size in (1, 3))
    assert mean_geometry([one, three]).rank == 2
    assert mean_geometry([one, three]).norm == pytest.approx((1 + 3**0.5) / 2)
