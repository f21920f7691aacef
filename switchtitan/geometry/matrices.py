"""Numbers that describe a matrix, all from its singular values."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from switchtitan.spectra.spectrum import effective_rank, numerical_rank


class MatrixGeometry(NamedTuple):
    """Ranks and norm of a matrix with singular values s_1 >= s_2 >= ..., or means over matrices."""

    rank: float
    """Number of singular values above `NUMERICAL_RANK_THRESHOLD` of s_1."""
    effective_rank: float
    """exp of the entropy of s / sum(s); see `spectra.spectrum.effective_rank`."""
    effective_rank_ratio: float
    """`effective_rank` over min(out, in)."""
    stable_rank: float
    """sum(s^2) / s_1^2."""
    spectral_gap: float
    """(s_1 - s_2) / s_1. Of a matrix with one row or column, s_2 is 0."""
    norm: float
    """Frobenius norm, sqrt(sum(s^2))."""
    relative_norm: float
    """`norm` over the reference's."""


def matrix_geometry(values: Tensor, reference_norm: float | None = None) -> MatrixGeometry:
    """Returns what the singular values say; all zeros for a zero matrix.

    Args:
        values: [min(out, in)], largest first, as `singular_values` returns them.
        reference_norm: what `relative_norm` divides by: of an update, the norm of the weight that
            it changes. By default the matrix's own norm.
    """
    wide = values.double()
    largest = wide[0].item()
    if largest == 0:
        return MatrixGeometry(*[0.0] * len(MatrixGeometry._fields))
    second = wide[1].item() if len(wide) > 1 else 0.0
    squares = wide.square().sum().item()
    norm = squares**0.5
    reference = norm if reference_norm is None else reference_norm
    effective = effective_rank(values)
    return MatrixGeometry(
        rank=numerical_rank(values),
        effective_rank=effective,
        effective_rank_ratio=effective / len(values),
        stable_rank=squares / largest**2,
        spectral_gap=(largest - second) / largest,
        norm=norm,
        relative_norm=norm / reference if reference > 0 else float("inf"),
    )


def mean_geometry(layers: Collection[MatrixGeometry]) -> MatrixGeometry:
    """Averages every number over matrices, each with the same weight."""
    return MatrixGeometry(*(sum(column) / len(layers) for column in zip(*layers, strict=True)))


Layers = Mapping[str, MatrixGeometry]
"""By the layer's qualified name."""
