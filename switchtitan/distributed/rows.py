"""Rows of sharded matrices: local views of them, and one collective that gathers those of many."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import local, row_range
from switchtitan.numerics.split_float import join

Spans = tuple[range, ...]
"""Rows as spans of neighbouring indices, in order, which are cheap to slice."""


class ShardedRows:
    """The rows that this rank holds of a matrix [rows, width], sharded along dimension 0 or plain.

    Looks up the row range once: asking the mesh takes longer than slicing. `shard` [held, width]
    shares memory with the matrix. Not for autograd.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.width, self.held = matrix.shape[1], row_range(matrix)
        self.shard = local(matrix)


class RowSpans(NamedTuple):
    """Some rows of a matrix."""

    matrix: ShardedRows
    spans: Spans
    """Equal on every rank."""


def paired_rows(requests: list[RowSpans], rows: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns (view of a shard, view of `rows[i]` [wanted, width]) for local rows of request i."""
    pairs = []
    for (matrix, spans), values in zip(requests, rows, strict=True):
        first, end, position = matrix.held.start, matrix.held.stop, 0
        for span in spans:
            start, stop = max(span.start, first), min(span.stop, end)
            if start < stop:  # most spans are on other ranks
                held = matrix.shard.narrow(0, start - first, stop - start)
                wanted = values.narrow(0, position + start - span.start, stop - start)
                pairs.append((held, wanted))
            position += len(span)
    return pairs


def copy_all_(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies each pair's second tensor into its first.

    On CUDA this takes a few kernels if all are contiguous, and all first ones and all second ones
    have one dtype; otherwise one for each pair. (torch/aten, ForeachUtils.h)
    """
    if pairs:
        torch._foreach_copy_([into for into, _ in pairs], [values for _, values in pairs])


def gather_rows(
    requests: list[RowSpans], group: dist.ProcessGroup | None, low_bits: Sequence[RowSpans] = ()
) -> list[Tensor]:
    """Returns copies of the rows of each request, [wanted, width], in one collective.

    Every rank of `group` fills in the rows that it holds and zeros for the rest; summing the bit
    patterns is exact. There is at least one request; all matrices have one dtype and device. A
    plain one counts as the sum of all ranks' bit patterns.

    Args:
        low_bits: of the first requests, whose matrices are in bf16; see `numerics.split_float`.
    """
    if low_bits:
        num = len(low_bits)
        packed = join(pack_rows(requests[:num])[0], pack_rows([*low_bits])[0])
        if requests[num:]:
            packed = torch.cat([packed, pack_rows(requests[num:])[0]])
        rows = cut(packed, _shapes(requests))
    else:
        packed, rows = pack_rows(requests)
    if group is not None:
        bits = packed.view(torch.int64 if packed.itemsize == 8 else torch.int32)
        dist.all_reduce(bits, group=group)
    return rows


def pack_rows(requests: list[RowSpans]) -> tuple[Tensor, list[Tensor]]:
    """Returns a flat tensor of local rows, with zeros for those of other ranks, and its view
    [wanted, width] for each request."""
    shapes = _shapes(requests)
    packed = requests[0].matrix.shard.new_zeros(sum(map(prod, shapes)))
    rows = cut(packed, shapes)
    copy_all_([(into, held) for held, into in paired_rows(requests, rows)])
    return packed, rows


def _shapes(requests: list[RowSpans]) -> list[tuple[int, int]]:
    return [(sum(map(len, spans)), matrix.width) for matrix, spans in requests]


def cut(packed: Tensor, shapes: Iterable[tuple[int, ...]]) -> list[Tensor]:
    """Splits a flat tensor into views of these shapes."""
    shapes = list(shapes)
    pieces = packed.split([prod(shape) for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
