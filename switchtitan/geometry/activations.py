"""How similar two models' activations are on the same tokens, block by block."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.contracts import IGNORED_TARGET, Batch, LanguageModel


class Similarity(NamedTuple):
    """The similarity of activations X to those of another model, Y, both [tokens, dim]."""

    linear_cka: float
    """|Xc^T Yc|^2 / (|Xc^T Xc| |Yc^T Yc|), Xc and Yc minus their mean over tokens: 1 if one is the
    other up to a rotation, a scale and a shift. (arXiv 1905.00414, section 3)"""
    cosine: float
    """Mean over positions of the cosine of x and y."""
    relative_l2: float
    """|X - Y| / |Y|, Frobenius norms."""


class SimilarityOfActivations:
    """Accumulates the similarity of activations over batches. Keeps sums, [dim, dim] in fp64."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._sums: list[Tensor] = []
        """Sum of x and of y [dim], of the products x x^T, y y^T, x y^T [dim, dim], of cosines,
        of |x - y|^2 and |y|^2."""

    def add(self, first: Tensor, second: Tensor) -> None:
        """Adds activations of the same tokens, both [tokens, dim]."""
        x, y = first.double(), second.double()
        terms = [
            x.sum(0),
            y.sum(0),
            x.T @ x,
            y.T @ y,
            x.T @ y,
            F.cosine_similarity(x, y, dim=1).sum(),
            (x - y).square().sum(),
            y.square().sum(),
        ]
        self._num_tokens += len(x)
        if self._sums:
            terms = [total + term for total, term in zip(self._sums, terms, strict=True)]
        self._sums = terms

    def result(self) -> Similarity:
        """Returns the similarity over all tokens; NaN where activations do not vary."""
        n = self._num_tokens
        x, y, xx, yy, xy, cosines, distance, size = self._sums
        xx_centred, yy_centred, xy_centred = (
            products - torch.outer(left, right) / n
            for products, left, right in ((xx, x, x), (yy, y, y), (xy, x, y))
        )
        cka = xy_centred.square().sum() / (xx_centred.norm() * yy_centred.norm())
        return Similarity(cka.item(), cosines.item() / n, (distance / size).sqrt().item())


@torch.no_grad()
def compare_activations(
    model: LanguageModel, other: LanguageModel, batches: Iterable[Batch], device: torch.device
) -> dict[str, Similarity]:
    """Returns the similarity of each block's output, the residual stream, to the other model's.

    Args:
        model, other: on `device`, with the same number of blocks of the same width.
        batches: tokens without a target are padding, and do not count.
    """
    names = list(model.blocks())
    similarities = [SimilarityOfActivations() for _ in names]
    for batch in batches:
        tokens, targets, document_ids = (part.to(device) for part in batch)
        is_real = targets != IGNORED_TARGET
        outputs = [
            _block_outputs(one, list(one.blocks().values()), tokens, document_ids)
            for one in (model, other)
        ]
        for similarity, first, second in zip(similarities, *outputs, strict=True):
            similarity.add(first[is_real], second[is_real])
    return {name: similarity.result() for name, similarity in zip(names, similarities, strict=True)}


def mean_similarity(blocks: Sequence[Similarity]) -> Similarity:
    """Averages over blocks."""
    return Similarity(*(sum(column) / len(blocks) for column in zip(*blocks, strict=True)))


def _block_outputs(
    model: LanguageModel, blocks: Sequence[nn.Module], tokens: Tensor, document_ids: Tensor
) -> list[Tensor]:
    """Returns what each block returns, [batch, seq, dim]. Computes no logits."""
    outputs: list[Tensor] = []
    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(
                block.register_forward_hook(lambda _, __, output: outputs.append(output))
            )
        model(tokens, document_ids, lambda hidden, head: hidden)
    return outputs
