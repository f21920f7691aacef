"""Gathers rows of many sharded matrices on all ranks, in one collective."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from switchtitan.distributed.shards import ShardedRows, Spans, copy_all_
from switchtitan.errors import RanksDisagreeError


class RowRequest(NamedTuple):
    """Rows of one matrix that every rank needs."""

    source: ShardedRows
    """Sharded along dimension 0; or a plain tensor, whose value is the sum of all ranks' bit
    patterns: each rank fills in what it has, and zeros for the rest."""
    spans: Spans
    """Row indices, equal on every rank."""


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

    def gather(self, requests: list[RowRequest], checksum: int) -> list[Tensor]:
        """Returns copies of the rows of each request, [wanted, width].

        Args:
            checksum: any number, equal on ranks with equal requests.
        """
        shapes = [(sum(map(len, spans)), source.width) for source, spans in requests]
        sizes = [num_rows * width for num_rows, width in shapes]
        num_ranks = 1 if self._group is None else self._group.size()
        # The checksums come first, one for each rank.
        length, device = num_ranks + padded_length(sum(sizes)), self._disagreement.device
        packed = torch.zeros(length, dtype=self._dtype, device=device)
        pieces = packed[num_ranks : num_ranks + sum(sizes)].split(sizes)
        rows = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        pairs: list[tuple[Tensor, Tensor]] = []
        for (source, spans), piece in zip(requests, rows, strict=True):
            pairs += [(into, held) for held, into in source.paired(spans, piece)]
        copy_all_(pairs)
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
