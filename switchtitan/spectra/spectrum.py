"""Computes effective ranks of matrices from their singular values, on plain tensors."""

import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

Spectra = Mapping[str, Tensor]
"""Singular values [min(out, in)] by the layer's qualified name, largest first."""


class RankSummary(NamedTuple):
    """Effective ranks, averaged over layers."""

    effective: float
    effective_by_kind: dict[str, float]
    """By the layers' local name, e.g. "q_proj"."""


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


def layers_by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups layers, in order of first occurrence, by their name in a part of a block: "up_proj" is
    that of "model.layers.0.mlp.up_proj"."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = re.sub(r"^(.*\.)?\d+\.([^.]+\.)?", "", name)
        kinds.setdefault(kind, []).append(name)
    return kinds


def summarize(spectra: Spectra) -> RankSummary:
    """Averages ranks over all layers and over the layers of each kind."""
    effective = {name: effective_rank(values) for name, values in spectra.items()}
    return RankSummary(
        effective=fmean(effective.values()),
        effective_by_kind={
            kind: fmean(effective[name] for name in names)
            for kind, names in layers_by_kind(spectra).items()
        },
    )


def mean_normalized_spectrum(spectra: Spectra) -> Tensor:
    """Averages, over layers, singular values as shares of each layer's largest: [max min(out, in)].

    Layers with fewer values are padded with zeros. An unchanged layer counts as zero."""
    tiny = torch.finfo(torch.float32).tiny
    rows = [values / values.max().clamp(min=tiny) for values in spectra.values()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).mean(dim=0)
