"""Rows of sharded matrices: local views of them, and one collective that gathers those of many."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.shards import local_shards, row_range
from switchtitan.errors import RanksDisagreeError

Spans = tuple[range, ...]
"""Rows as spans of neighbouring indices, in order, which are cheap to slice."""


class ShardedRows:
    """The rows that this rank holds of a matrix [rows, width], sharded along dimension 0 or plain.

    Looks up the row range once: asking the mesh takes longer than slicing. Not for autograd.

    Attributes:
        shard: the local shard [held, width], sharing memory with `matrix`.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.width, self.held = matrix.shape[1], row_range(matrix)
        (self.shard,) = local_shards([matrix])

    def paired(self, spans: Spans, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Returns (view of the shard, view of `rows` [wanted, width]) for local rows of `spans`."""
        first, end = self.held.start, self.held.stop
        pairs = []
        position = 0
        for span in spans:
            start, stop = max(span.start, first), min(span.stop, end)
            if start < stop:  # most spans are on other ranks
                held = self.shard.narrow(0, start - first, stop - start)
                wanted = rows.narrow(0, position + start - span.start, stop - start)
                pairs.append((held, wanted))
            position += len(span)
        return pairs


class RowSpans(NamedTuple):
    """Some rows of a matrix."""

    matrix: ShardedRows
    spans: Spans
    """Equal on every rank."""


def paired_rows(spans: list[RowSpans], rows: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns (view of a shard, view of `rows[i]` [wanted, width]) for local rows of `spans[i]`."""
    return [
        pair
        for (matrix, wanted), values in zip(spans, rows, strict=True)
        for pair in matrix.paired(wanted, values)
    ]


def copy_all_(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copies each pair's second tensor into its first.

    On CUDA this takes a few kernels if all are contiguous, and all first ones and all second ones
    have one dtype; otherwise one for each pair. (torch/aten, ForeachUtils.h)
    """
    if pairs:
        torch._foreach_copy_([into for into, _ in pairs], [values for _, values in pairs])


class RowExchange:
    """Gathers rows of many sharded matrices on all ranks that share them, in one collective.

    Every rank fills in the rows that it holds and zeros for the rest; summing the bit patterns is
    exact. A checksum of each rank's requests is sent along; `check` raises if two ranks disagreed.

    Args:
        dtype: of all matrices.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._group, self._dtype = group, dtype
        self._disagreement = torch.zeros((), dtype=torch.bool, device=device)

    def gather(self, requests: list[RowSpans], checksum: int) -> list[Tensor]:
        """Returns copies of the rows of each request, [wanted, width].

        Args:
            requests: of sharded matrices; or of plain ones, whose value is the sum of all ranks'
                bit patterns: each rank fills in what it has, and zeros for the rest.
            checksum: any number, equal on ranks with equal requests.
        """
        shapes = [(sum(map(len, spans)), matrix.width) for matrix, spans in requests]
        sizes = [num_rows * width for num_rows, width in shapes]
        num_ranks = 1 if self._group is None else self._group.size()
        # The checksums come first, one for each rank.
        length, device = num_ranks + padded_length(sum(sizes)), self._disagreement.device
        packed = torch.zeros(length, dtype=self._dtype, device=device)
        pieces = packed[num_ranks : num_ranks + sum(sizes)].split(sizes)
        rows = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        copy_all_([(into, held) for held, into in paired_rows(requests, rows)])
        if self._group is not None:
            bits = packed.view(torch.int64 if packed.itemsize == 8 else torch.int32)
            # Not `bits[rank] = checksum`: that copies from the host, which then waits.
            rank = self._group.rank()
            bits[rank : rank + 1].fill_(checksum & 0x7FFFFFFF)
            dist.all_reduce(bits, group=self._group)
            self._disagreement |= (bits[:num_ranks] != checksum & 0x7FFFFFFF).any()
        return rows

    def check(self) -> None:
        """Raises a RanksDisagreeError if ranks have not agreed since the start.

        Waits for the device. Collective over all ranks, so that other replicas stop too.
        """
        if is_fake(self._disagreement):
            return  # in an estimate, tensors have no values
        disagreement = self._disagreement.to(torch.int32)
        if self._group is not None and self._group.size() < dist.get_world_size():
            dist.all_reduce(disagreement, op=dist.ReduceOp.MAX)
        if bool(disagreement):
            raise RanksDisagreeError(
                "ranks disagree on what to exchange: they are at different steps or run different "
                "configurations; stop, and resume all ranks from one checkpoint"
            )


def padded_length(num_elements: int) -> int:
    """Returns `num_elements` rounded up by at most an eighth.

    Ranks that disagree then mostly run the same collective, so the checksum reveals them.
    """
    unit = 1 << max(10, (num_elements - 1).bit_length() - 4)
    return -(-num_elements // unit) * unit
