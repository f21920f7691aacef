"""Computes effective ranks of matrices from their singular values, on plain tensors."""

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

Spectra = Mapping[str, Tensor]
"""Singular values [min(out, in)] by the layer's qualified name, largest first."""


def singular_values(matrix: Tensor) -> Tensor:
    """Returns the singular values of a matrix [rows, columns], largest first, in fp32 on the CPU.

    Roots of the eigenvalues of the smaller Gram matrix in fp64 take a third of the time of an SVD.
    Values below 1e-8 of the largest are noise, but fp32 weights have a precision of only 6e-8.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return eigenvalues.clamp(min=0).sqrt().flip(0).to("cpu", torch.float32)


def effective_rank(values: Tensor) -> float:
    """Returns exp of the entropy of singular values [n], normalized to sum 1; 0 if all are 0.

    For r equal values it is r. (Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", definition 1)
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values.double() / total).sum().exp().item()


def mean_effective_rank(spectra: Spectra) -> float:
    """Averages effective ranks over layers."""
    return fmean(map(effective_rank, spectra.values()))


def mean_normalized_spectrum(spectra: Spectra) -> Tensor:
    """Averages, over layers, singular values as shares of each layer's largest: [max min(out, in)].

    Layers with fewer values are padded with zeros. An unchanged layer counts as zero."""
    tiny = torch.finfo(torch.float32).tiny
    rows = [values / values.max().clamp(min=tiny) for values in spectra.values()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).mean(dim=0)
