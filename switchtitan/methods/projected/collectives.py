"""Sums and rows of many small matrices, each kind in one collective a step."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from switchtitan.distributed.shards import local, rows_per_rank, shard_group


class PackedRows:
    """Sums matrices over ranks such that each rank keeps its own rows, and gathers rows again; all matrices at once.

    A sum that is scattered and rows that are gathered travel as far as one sum that every rank gets whole, but what is kept
    of them, such as moments, is split over the ranks. On one rank nothing travels and nothing is copied.

    Args:
        matrices: [rows, width] each, all plain, or all split along dimension 0 over the same ranks: what the rows are like.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        self._group = shard_group(matrices[0]) if matrices else None
        self._num_ranks = 1 if self._group is None else self._group.size()
        self._shapes = [tuple(matrix.shape) for matrix in matrices]
        self._held = [local(matrix).shape[0] for matrix in matrices]
        # What the last ranks lack is padding.
        self._rows_per_rank = [rows_per_rank(rows, self._num_ranks) for rows, _ in self._shapes]
        self._sizes = [
            rows * width for rows, (_, width) in zip(self._rows_per_rank, self._shapes, strict=True)
        ]

    def sum_and_scatter(self, partials: list[Tensor]) -> list[Tensor]:
        """This rank's rows of each matrix summed over ranks.

        Args:
            partials: [rows, width] each, this rank's summand.
        """
        if self._group is None:
            return partials
        packed = partials[0].new_empty(self._num_ranks, sum(self._sizes))
        for partial, block in zip(partials, self._blocks(packed), strict=True):
            padding = block.shape[0] * block.shape[1] - partial.shape[0]
            block.copy_(F.pad(partial, (0, 0, 0, padding)).view(block.shape))
        own = torch.empty_like(packed[0])
        # Lists of chunks: newer versions of torch have renamed the collectives that take one tensor.
        dist.reduce_scatter(own, list(packed.unbind()), group=self._group)
        blocks = self._blocks(own.unsqueeze(0))
        return [block[0, :held] for block, held in zip(blocks, self._held, strict=True)]

    def gather(self, parts: list[Tensor]) -> list[Tensor]:
        """Each matrix whole, on every rank.

        Args:
            parts: this rank's rows of each.
        """
        if self._group is None:
            return parts
        own = parts[0].new_zeros(sum(self._sizes))
        for part, block in zip(parts, self._blocks(own.unsqueeze(0)), strict=True):
            block[0, : part.shape[0]] = part
        packed = own.new_empty(self._num_ranks, own.numel())
        dist.all_gather(list(packed.unbind()), own, group=self._group)
        return [
            block.flatten(0, 1)[: shape[0]]
            for block, shape in zip(self._blocks(packed), self._shapes, strict=True)
        ]

    def _blocks(self, packed: Tensor) -> list[Tensor]:
        """Views [ranks, rows / ranks, width] of each matrix's place in `packed` [ranks, all sizes]."""
        return [
            part.unflatten(1, (rows, width))
            for part, rows, (_, width) in zip(
                packed.split(self._sizes, dim=1), self._rows_per_rank, self._shapes, strict=True
            )
        ]


def sum_packed(tensors: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The sum of each tensor over the ranks of `group`, all in one collective; the tensors themselves where there is none."""
    if group is None or not tensors:
        return tensors
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(packed, group=group)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
