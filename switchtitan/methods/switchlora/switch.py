"""The arithmetic of a switch, on plain tensors or one rank's shards of them."""

import torch
from torch import Tensor

from switchtitan.distributed.shards import Spans, by_layout, copy_all_
from switchtitan.methods.lowrank.rounding import Rounding, add_product_


def fold_into_weight_(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, rounding: Rounding | None = None
) -> None:
    """Moves what a switch takes from B A into the frozen weight, so that the layer's output does not change.

    Keeps W + s B A constant: W += s (B[:, I] (A_old - A_new)[I] + (B_old - B_new)[:, J] A[J]), one update of rank 2k
    (SwitchLoRA, arXiv 2406.06564, Algorithm 1; both sides at once, since the rows I and the columns J are disjoint).

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        left: [out, 2k], on the same rows as `weight`: B's columns I, then B_old - B_new in columns J.
        right: [2k, in], whole on every rank: A_old - A_new in rows I, then A's rows J.
        rounding: for a weight in bf16; the layer's output then stays what it is in the mean.
    """
    add_product_(weight, left, right, scale, rounding)


def take_columns(matrices: list[Tensor], spans: list[Spans]) -> list[Tensor]:
    """Copies of the columns `spans[i]` of `matrices[i]`, [rows, wanted] each, in few operations; on CUDA, in a kernel for
    each span of each matrix."""
    taken = [
        matrix.new_empty(len(matrix), sum(map(len, wanted)))
        for matrix, wanted in zip(matrices, spans, strict=True)
    ]
    copy_all_(_all_parts(taken, spans), _all_views(matrices, spans))
    return taken


def subtract_all_(minuends: list[Tensor], subtrahends: list[Tensor]) -> None:
    """Subtracts from each of `minuends` its counterpart, in few operations; see `by_layout`."""
    for left, right in by_layout(minuends, subtrahends):
        torch._foreach_sub_(left, right)


def column_views(matrix: Tensor, spans: Spans) -> list[Tensor]:
    """The columns in `spans`, one view for each span."""
    return [matrix[:, span.start : span.stop] for span in spans]


def split_columns(columns: Tensor, spans: Spans) -> list[Tensor]:
    """`columns` [rows, wanted] cut as `spans` are."""
    return list(columns.split([len(span) for span in spans], dim=1))


def write_columns_(matrices: list[Tensor], spans: list[Spans], columns: list[Tensor]) -> None:
    """Writes `columns[i]` [rows, wanted] to the columns `spans[i]` of `matrices[i]`, in few operations; on CUDA, in a
    kernel for each span of each matrix."""
    copy_all_(_all_views(matrices, spans), _all_parts(columns, spans))


def _all_views(matrices: list[Tensor], spans: list[Spans]) -> list[Tensor]:
    return [
        view for matrix, wanted in zip(matrices, spans, strict=True) for view in column_views(matrix, wanted)
    ]


def _all_parts(columns: list[Tensor], spans: list[Spans]) -> list[Tensor]:
    return [
        part for values, wanted in zip(columns, spans, strict=True) for part in split_columns(values, wanted)
    ]
