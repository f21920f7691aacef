"""Gathers rows of many sharded matrices on all ranks, in one collective."""

import zlib
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


class _Section(NamedTuple):
    """The requests of one dtype, stored next to each other, so that each dtype takes few copies."""

    dtype: torch.dtype
    places: list[int]
    """Indices into the list of all requests."""
    shapes: list[tuple[int, int]]
    """[wanted, width] of each."""

    @property
    def sizes(self) -> list[int]:
        return [num_rows * width for num_rows, width in self.shapes]

    @property
    def num_words(self) -> int:
        """Size in 32-bit words, even, so that the next section may hold 64-bit numbers."""
        return -(-sum(self.sizes) * self.dtype.itemsize // 8) * 2


class RowExchange:
    """Gathers rows of many sharded matrices on all ranks that share them, in one collective.

    Every rank fills in the rows that it holds and zeros for the rest; summing the bit patterns is
    exact. A checksum of each rank's requests is sent along: if two ranks disagree, `check` raises.
    The flag stays on the device until then, so that `gather` does not make the host wait.

    Attributes:
        history: a checksum of all checksums so far, equal on ranks of other groups as well.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._disagreement = torch.zeros((), dtype=torch.bool, device=device)
        self.history = 0

    def gather(self, requests: list[RowRequest], checksum: int) -> list[Tensor]:
        """Returns copies of the rows of each request, [wanted, width].

        Args:
            checksum: any 31-bit number, equal on ranks with equal requests.
        """
        self.history = zlib.crc32(checksum.to_bytes(4, "little"), self.history)
        num_ranks = 1 if self._group is None else self._group.size()
        header = num_ranks + num_ranks % 2
        sections = _sections(requests)
        num_words = header + sum(section.num_words for section in sections)
        if self._group is not None:
            num_words = padded_length(num_words)
        packed = torch.zeros(num_words, dtype=torch.int32, device=self._disagreement.device)
        rows = _pack_(packed[header:], requests, sections)
        if self._group is not None:
            # Not `packed[rank] = checksum`: that copies from the host, which then waits.
            rank = self._group.rank()
            packed[rank : rank + 1].fill_(checksum)
            dist.all_reduce(packed, group=self._group)
            self._disagreement |= (packed[:num_ranks] != checksum).any()
        return rows

    def check(self) -> None:
        """Checks that ranks have agreed since the start; waits for the device.

        Collective over all ranks, so that those of other replicas stop with the same message.

        Raises:
            RanksDisagreeError: if not; the ranks' weights are no longer those of one model.
        """
        if is_fake(self._disagreement):
            return  # it has a shape and no value, as all tensors of an estimate
        disagreement = self._disagreement.to(torch.int32)
        if self._group is not None and self._group.size() < dist.get_world_size():
            dist.all_reduce(disagreement, op=dist.ReduceOp.MAX)
        if bool(disagreement):
            raise RanksDisagreeError(
                "ranks disagree on what to exchange: they are at different steps or run different "
                "configurations; stop, and resume all ranks from one checkpoint"
            )


def padded_length(num_words: int) -> int:
    """Returns `num_words` rounded up by at most an eighth.

    Ranks whose requests differ slightly in length then almost always run the same collective, and
    the checksum reveals them.
    """
    unit = 1 << max(10, (num_words - 1).bit_length() - 4)
    return -(-num_words // unit) * unit


def _sections(requests: list[RowRequest]) -> list[_Section]:
    sections: dict[torch.dtype, _Section] = {}
    for place, (source, spans) in enumerate(requests):
        section = sections.setdefault(source.dtype, _Section(source.dtype, [], []))
        section.places.append(place)
        section.shapes.append((sum(map(len, spans)), source.width))
    return list(sections.values())


def _pack_(words: Tensor, requests: list[RowRequest], sections: list[_Section]) -> list[Tensor]:
    """Writes the rows that this rank holds into `words` [num_words] int32.

    Returns:
        A view of `words` for each request's rows, [wanted, width].
    """
    rows: dict[int, Tensor] = {}
    start = 0
    for section in sections:
        stop = start + section.num_words
        pieces = words[start:stop].view(section.dtype)[: sum(section.sizes)].split(section.sizes)
        start = stop
        pairs = []
        for place, piece, shape in zip(section.places, pieces, section.shapes, strict=True):
            source, spans = requests[place]
            rows[place] = piece.view(shape)
            pairs += [(into, held) for held, into in source.paired(spans, rows[place])]
        copy_all_(pairs)
    return [rows[place] for place in range(len(requests))]
