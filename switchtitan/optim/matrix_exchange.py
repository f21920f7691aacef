"""Collects each of many sharded matrices on one rank, and distributes it again."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import copy_all_, row_range, rows_per_rank, shard_group
from switchtitan.regions import region


class _Batch(NamedTuple):
    """Matrices of one shape that this rank owns."""

    num_matrices: int
    shape: tuple[int, int]
    """[rows, width] of each."""
    rows_per_rank: int
    """Rows on each of the first ranks."""

    @property
    def size_per_rank(self) -> int:
        return self.num_matrices * self.rows_per_rank * self.shape[1]


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
        # The last ranks send rows that do not exist, so that all ranks send equally much.
        chunks = [rows_per_rank(shapes[place][0], self._num_ranks) for place in order]
        self._sizes = [rows * width for rows, (_, width) in zip(chunks, self._held, strict=True)]
        self._sizes_of_owners = [0] * self._num_ranks
        for place, size in zip(order, self._sizes, strict=True):
            self._sizes_of_owners[owners[place]] += size
        self._own_sizes = [self._sizes_of_owners[rank]] * self._num_ranks
        owned = [shapes[place] for place in order if owners[place] == rank]
        self._batches = [
            _Batch(len(list(alike)), shape, rows_per_rank(shape[0], self._num_ranks))
            for shape, alike in groupby(owned)
        ]

    def collect(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Returns the matrices that this rank owns, [matrices, rows, width] for each shape.

        Args:
            parts: this rank's rows of each matrix.
        """
        parts = [parts[place] for place in self._order]
        if self._group is None:
            batches = [self._empty(batch.num_matrices, *batch.shape) for batch in self._batches]
            copy_all_(list(zip(_matrices(batches), parts, strict=True)))
            return batches
        packed = self._empty(sum(self._sizes))
        copy_all_(list(zip(self._own_rows(packed), parts, strict=True)))
        received = self._empty(sum(self._own_sizes))
        with region("reduce"):
            dist.all_to_all_single(
                received, packed, self._own_sizes, self._sizes_of_owners, group=self._group
            )
        batches = [self._empty(batch.num_matrices, *batch.shape) for batch in self._batches]
        for rows, of_batch in self._paired(received, batches):
            of_batch.copy_(rows)
        return batches

    def distribute(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Returns this rank's rows of each matrix; they share memory, on one rank with `batches`.

        Args:
            batches: the matrices that this rank owns, as `collect` returned them.
        """
        if self._group is None:
            own = _matrices(batches)
        else:
            packed = self._empty(sum(self._own_sizes))
            for rows, of_batch in self._paired(packed, batches):
                rows.copy_(of_batch)
            received = self._empty(sum(self._sizes))
            with region("reduce"):
                dist.all_to_all_single(
                    received, packed, self._sizes_of_owners, self._own_sizes, group=self._group
                )
            own = self._own_rows(received)
        parts = dict(zip(self._order, own, strict=True))
        return [parts[place] for place in range(len(parts))]

    def _own_rows(self, packed: Tensor) -> list[Tensor]:
        """Returns views [held, width] of this rank's rows, in the order of `self._order`."""
        return [
            piece[: rows * width].view(rows, width)
            for piece, (rows, width) in zip(packed.split(self._sizes), self._held, strict=True)
        ]

    def _blocks(self, packed: Tensor) -> list[Tensor]:
        """Returns a view [ranks, matrices, rows/ranks, width] for each batch.

        Args:
            packed: of each rank, its rows of the matrices that this rank owns.
        """
        sizes = [batch.size_per_rank for batch in self._batches]
        return [
            block.unflatten(1, (batch.num_matrices, batch.rows_per_rank, batch.shape[1]))
            for block, batch in zip(
                packed.view(self._num_ranks, sum(sizes)).split(sizes, dim=1),
                self._batches,
                strict=True,
            )
        ]

    def _paired(self, packed: Tensor, batches: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Returns (view of `packed`, view of a batch) of the same rows: those of all ranks with the
        same number of rows, and those of the next one, if it has fewer."""
        pairs = []
        for blocks, batch, (_, (num_rows, _), chunk) in zip(
            self._blocks(packed), batches, self._batches, strict=True
        ):
            num_full, num_left = divmod(num_rows, chunk)
            full = batch[:, : num_full * chunk].unflatten(1, (num_full, chunk))
            pairs.append((blocks[:num_full].transpose(0, 1), full))
            if num_left:
                pairs.append((blocks[num_full, :, :num_left], batch[:, num_full * chunk :]))
        return pairs


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
