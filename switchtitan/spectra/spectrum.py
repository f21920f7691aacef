"""The rank of matrices as their singular values tell it. Works on plain tensors."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.errors import ConfigError

NUMERICAL_RANK_THRESHOLD = 0.01
"""A singular value counts in the numerical rank if it is larger than this share of the largest one."""

Spectra = Mapping[str, Tensor]
"""Singular values [min(out, in)] by the layer's qualified name, largest first."""


class RankSummary(NamedTuple):
    """Ranks averaged over layers."""

    effective: float
    numerical: float
    effective_by_kind: dict[str, float]
    """By the layers' local name, e.g. "q_proj"."""
    effective_by_layer: dict[str, float]
    """Each layer's own, by its qualified name."""


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix [rows, columns], largest first: [min(rows, columns)] fp32 on the CPU.

    They are the roots of the smaller Gram matrix's eigenvalues in fp64, which take a third of the time of a singular value
    decomposition (1024 x 2736 on one CPU thread: 0.24 s against 0.74 s). The square costs half the digits: what is below 1e-8
    of the largest is noise. The fp32 weights themselves are known to 6e-8 only.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return eigenvalues.clamp(min=0).sqrt().flip(0).to("cpu", torch.float32)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values, taken as shares of their sum (Roy and Vetterli 2007, "The effective rank: a
    measure of effective dimensionality", definition 1): r for r equal values, 1 for a single one; 0 for a zero matrix.

    Args:
        values: [n] singular values.
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values.double() / total).sum().exp().item()


def numerical_rank(values: Tensor) -> int:
    """The number of singular values [n] above `NUMERICAL_RANK_THRESHOLD` of the largest one."""
    return int((values > NUMERICAL_RANK_THRESHOLD * values.max()).sum())


def layer_kind(name: str) -> str:
    """A layer's local name, which it shares with its like in other blocks: "model.layers.0.mlp.up_proj" -> "up_proj"."""
    return name.rpartition(".")[2]


def layers_by_kind(names: Collection[str]) -> dict[str, list[str]]:
    """Layers by their kind, in the order in which kinds first come."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(layer_kind(name), []).append(name)
    return kinds


def select_layers(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """The layers whose kind or qualified name fits any of the shell patterns, e.g. "q_proj", "model.layers.3.*".

    Raises:
        ConfigError: if a pattern fits none.
    """

    def fits(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(layer_kind(name), pattern)

    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ConfigError(
                f"--layers {pattern}: fits no layer; expected one of {', '.join(layers_by_kind(names))}, or a pattern for "
                f"names like {next(iter(names))}"
            )
    return [name for name in names if any(fits(name, pattern) for pattern in patterns)]


def summarize(spectra: Spectra) -> RankSummary:
    """Mean ranks over all layers and over the layers of each kind."""
    effective = {name: effective_rank(values) for name, values in spectra.items()}
    return RankSummary(
        effective=_mean(effective.values()),
        numerical=_mean([numerical_rank(values) for values in spectra.values()]),
        effective_by_kind={
            kind: _mean([effective[name] for name in names])
            for kind, names in layers_by_kind(spectra).items()
        },
        effective_by_layer=effective,
    )


def shares_of_largest(values: Tensor) -> Tensor:
    """Singular values [n] as shares of the largest one; zeros stay zero."""
    return values / values.max().clamp(min=torch.finfo(values.dtype).tiny)


def normalized_by_kind(spectra: Spectra) -> dict[str, Tensor]:
    """The singular values of all layers of a kind as shares of each layer's largest one, one after another, by kind."""
    return {
        kind: torch.cat([shares_of_largest(spectra[name]) for name in names])
        for kind, names in layers_by_kind(spectra).items()
    }


def mean_normalized_spectrum(spectra: Spectra) -> Tensor:
    """The mean over layers of the singular values as shares of each layer's largest one, [largest min(out, in)].

    A layer with fewer values counts as zero beyond its last one, as it would inside a larger matrix; so does an unchanged one.
    """
    rows = [shares_of_largest(values) for values in spectra.values()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).mean(dim=0)


def _mean(numbers: Collection[float]) -> float:
    return sum(numbers) / len(numbers)
