"""Collects each of many sharded matrices on one rank, and distributes it again."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from switchtitan.distributed.rows import copy_all_
from switchtitan.distributed.shards import row_range, rows_per_rank, shard_group
from switchtitan.regions import region


class MatrixExchange:
    """Collects each matrix on one rank, its owner, and distributes its rows again.

    For updates that need the full matrix: ranks share the work instead of repeating it. Each way
    takes one collective, in which a rank sends and receives about its own shards. Owners depend
    only on shapes, costs and the number of ranks. Replicas do not communicate: each has owners of
    its own. On one rank nothing is sent.

    Args:
        matrices: [rows, width] each, at least one: all plain, or all sharded along dimension 0 over
            the same ranks.
        costs: of the work on each matrix, by which owners are balanced.
        dtype: in which rows are sent.
    """

    def __init__(
        self, matrices: Sequence[Tensor], costs: Sequence[float], dtype: torch.dtype
    ) -> None:
        self._group = shard_group(matrices[0])
        self._empty = partial(torch.empty, dtype=dtype, device=matrices[0].device)
        self._num_ranks, rank = 1, 0
        if self._group is not None:
            self._num_ranks, rank = self._group.size(), self._group.rank()
        owners = balanced_owners(costs, self._num_ranks)
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        # Those of one owner follow each other, and among them those of one shape.
        order = sorted(range(len(matrices)), key=lambda place: (owners[place], shapes[place]))
        self._order = order
        self._held = [(len(row_range(matrices[place])), shapes[place][1]) for place in order]
        # Every rank sends the same number of rows; the last ones pad.
        self._sizes = [self._size_per_rank(shapes[place]) for place in order]
        self._sizes_of_owners = [0] * self._num_ranks
        for place, size in zip(order, self._sizes, strict=True):
            self._sizes_of_owners[owners[place]] += size
        self._own_sizes = [self._sizes_of_owners[rank]] * self._num_ranks
        # Of the matrices that this rank owns: shape -> number, in order.
        self._owned = Counter(shapes[place] for place in order if owners[place] == rank)

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns the matrices that this rank owns, [matrices, rows, width] for each shape, given
        its rows of each matrix."""
        parts = [parts[place] for place in self._order]
        if self._group is None:
            batches = [self._empty(count, *shape) for shape, count in self._owned.items()]
            copy_all_(list(zip(_matrices(batches), parts, strict=True)))
            return batches
        packed = self._empty(sum(self._sizes))
        copy_all_(list(zip(self._own_rows(packed), parts, strict=True)))
        received = self._empty(sum(self._own_sizes))
        with region("reduce"):
            dist.all_to_all_single(
                received, packed, self._own_sizes, self._sizes_of_owners, group=self._group
            )
        # Copies, so that the memory of what is received and of each batch can be freed.
        return [
            block.transpose(0, 1)
            .clone(memory_format=torch.contiguous_format)
            .flatten(1, 2)[:, :num_rows]
            for (num_rows, _), block in zip(self._owned, self._blocks(received), strict=True)
        ]

    def distribute(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each matrix, given what it owns as `collect` returned it.
        They share memory, on one rank with `batches`."""
        if self._group is None:
            own = _matrices(batches)
        else:
            packed = self._empty(sum(self._own_sizes))
            for batch, block in zip(batches, self._blocks(packed), strict=True):
                if num_missing := self._num_ranks * block.shape[2] - batch.shape[1]:
                    batch = F.pad(batch, (0, 0, 0, num_missing))
                block.copy_(batch.unflatten(1, (self._num_ranks, -1)).transpose(0, 1))
            received = self._empty(sum(self._sizes))
            with region("reduce"):
                dist.all_to_all_single(
                    received, packed, self._sizes_of_owners, self._own_sizes, group=self._group
                )
            own = self._own_rows(received)
        parts = dict(zip(self._order, own, strict=True))
        return [parts[place] for place in range(len(parts))]

    def _size_per_rank(self, shape: tuple[int, int]) -> int:
        return rows_per_rank(shape[0], self._num_ranks) * shape[1]

    def _own_rows(self, packed: Tensor) -> list[Tensor]:
        """Returns views [held, width] of this rank's rows, in the order of `self._order`."""
        return [
            piece[: rows * width].view(rows, width)
            for piece, (rows, width) in zip(packed.split(self._sizes), self._held, strict=True)
        ]

    def _blocks(self, packed: Tensor) -> list[Tensor]:
        """Returns a view [ranks, matrices, rows/ranks, width] for each batch, of the packed rows of
        the matrices that this rank owns."""
        sizes = [count * self._size_per_rank(shape) for shape, count in self._owned.items()]
        blocks = packed.view(self._num_ranks, sum(sizes)).split(sizes, dim=1)
        return [
            block.unflatten(1, (count, -1, shape[1]))
            for block, (shape, count) in zip(blocks, self._owned.items(), strict=True)
        ]


def _matrices(batches: Sequence[Tensor]) -> list[Tensor]:
    return [matrix for batch in batches for matrix in batch.unbind()]


def balanced_owners(costs: Sequence[float], num_ranks: int) -> list[int]:
    """Returns an owner for each cost: the most expensive first, to the rank with the least so far.

    No rank gets more than 4/3 of what the best assignment gives (Graham 1969, "Bounds on
    multiprocessing timing anomalies").
    """
    loads = [0.0] * num_ranks
    owners = [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        owner = min(range(num_ranks), key=loads.__getitem__)
        owners[place] = owner
        loads[owner] += costs[place]
    return owners
