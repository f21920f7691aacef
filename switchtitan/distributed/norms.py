"""Norms of tensors that are sharded over ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import local, shard_group


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all elements of all tensors, 0-dim; collective over their shards.

    All tensors are sharded over the same ranks, or none is.
    """
    # Norms of tensors first: the sum of all squares could overflow, and rounds more.
    norms = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    group = shard_group(tensors[0])
    # Squaring and its root round, so one rank, as in torch, does without.
    if group is not None and group.size() > 1:
        squares = norms.square_()
        dist.all_reduce(squares, group=group)
        norms = squares.sqrt_()
    return torch.linalg.vector_norm(norms)
