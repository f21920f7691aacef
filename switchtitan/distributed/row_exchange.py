"""One collective that brings rows of many sharded matrices to all ranks."""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import ShardedRows, Spans, copy_all_
from switchtitan.errors import RanksDisagreeError


class RowRequest(NamedTuple):
    """Rows of one matrix that every rank needs."""

    source: ShardedRows
    """Split along dimension 0; or plain, which counts as the sum of all ranks' bit patterns, so that a rank may fill in what
    it has, and zeros for the rest."""
    spans: Spans
    """Which rows, the same on every rank."""

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.spans)), self.source.width

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype


class RowExchange:
    """Gathers rows of many sharded matrices on all ranks that share them, in one collective.

    Every rank fills in the rows that it holds and zeros for the rest; a sum over the bit patterns brings all rows to all ranks
    exactly. A checksum of what each rank asks for travels with them: if two ranks disagree, `check` raises. The flag stays on
    the device until then, so that gathering does not make the host wait.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._disagreement = torch.zeros((), dtype=torch.bool, device=device)

    def gather(self, requests: list[RowRequest], checksum: int) -> list[Tensor]:
        """Copies of the rows of each request, [wanted, width].

        Args:
            checksum: any 31-bit number that ranks which agree have in common.
        """
        num_ranks = 1 if self._group is None else self._group.size()
        header = num_ranks + num_ranks % 2
        num_words = header + sum(_num_words(requests, dtype) for dtype in _dtypes(requests))
        if self._group is not None:
            num_words = padded_length(num_words)
        packed = torch.zeros(num_words, dtype=torch.int32, device=self._disagreement.device)
        rows = _pack_(packed[header:], requests)
        if self._group is not None:
            # Not `packed[rank] = checksum`, which copies a number from the host, and makes it wait.
            rank = self._group.rank()
            packed[rank : rank + 1].fill_(checksum)
            dist.all_reduce(packed, group=self._group)
            self._disagreement |= (packed[:num_ranks] != checksum).any()
        return rows

    def check(self) -> None:
        """Raises if ranks have disagreed since the start; waits for the device.

        Raises:
            RanksDisagreeError: if so; the ranks' weights are no longer those of one model.
        """
        if bool(self._disagreement):
            raise RanksDisagreeError(
                "ranks disagree on what to exchange: they are at different steps or run different configurations; "
                "stop, and resume all ranks from one checkpoint"
            )


def padded_length(num_words: int) -> int:
    """The length at which so many words travel: up to an eighth more.

    Ranks whose plans differ a little in length still meet in one collective, nearly always, and are found out.
    """
    unit = 1 << max(10, (num_words - 1).bit_length() - 4)
    return -(-num_words // unit) * unit


def _pack_(words: Tensor, requests: list[RowRequest]) -> list[Tensor]:
    """Writes the rows that this rank holds into `words` [num_words] int32; returns the place of each request, [wanted, width].

    Requests of one dtype lie together, so that each dtype takes a few copies.
    """
    places: dict[int, Tensor] = {}
    start = 0
    for dtype in _dtypes(requests):
        of_dtype = {i: request for i, request in enumerate(requests) if request.dtype == dtype}
        sizes = [math.prod(request.shape) for request in of_dtype.values()]
        stop = start + _num_words(requests, dtype)
        pieces = words[start:stop].view(dtype)[: sum(sizes)].split(sizes)
        start = stop
        for (index, request), piece in zip(of_dtype.items(), pieces, strict=True):
            places[index] = piece.view(request.shape)
        copy_all_(
            [
                (place, held)
                for index, request in of_dtype.items()
                for held, place in request.source.paired(request.spans, places[index])
            ]
        )
    return [places[index] for index in range(len(requests))]


def _dtypes(requests: list[RowRequest]) -> list[torch.dtype]:
    return list(dict.fromkeys(request.dtype for request in requests))


def _num_words(requests: list[RowRequest], dtype: torch.dtype) -> int:
    # In 32-bit words, even, so that what follows may hold 64-bit numbers.
    num_elements = sum(math.prod(request.shape) for request in requests if request.dtype == dtype)
    return -(-num_elements * dtype.itemsize // 8) * 2
