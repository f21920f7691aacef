"""Norms and sums of tensors that are sharded over ranks.

Replicas may sum their shards in different orders. What they sum decides updates, by which their
weights would diverge, so every sum here is the mean over replicas, with equal bits on all of them.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.rows import cut
from switchtitan.distributed.shards import all_ranks_group, local, replica_group, shard_group
from switchtitan.regions import region


def total_norm(tensors: Sequence[Tensor], loss: Tensor | None = None) -> Tensor:
    """Returns the 2-norm of all elements of all tensors, 0-dim, with equal bits on all ranks.

    All tensors are sharded over the same ranks, or none is. If this rank's `loss`, 0-dim, is not
    finite on any of those ranks, the norm is nan. Collective over all ranks.
    """
    # Norms of tensors first: the sum of all squares rounds more, and could overflow.
    shards = [local(tensor) for tensor in tensors]
    dtype = torch.promote_types(shards[0].dtype, torch.float32)
    norms = torch.stack(torch._foreach_norm(shards, 2, dtype))
    # Zero, or nan if the loss is not finite. Sent with the norms, in one message.
    zero = norms.new_zeros(()) if loss is None else loss * 0
    # Squaring and its root round, so one rank, as in torch, does without.
    if all_ranks_group(tensors[0]) is not None:
        squares, zero = sum_packed([norms.square_(), zero], tensors[0])
        norms = squares.sqrt_()
    return torch.linalg.vector_norm(norms) + zero


def non_finite(tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Returns the names of floating-point tensors with an inf or nan on any rank.

    The same names on every rank: collective over all ranks, whose default group communicates
    `device`; waits for it.
    """
    is_finite: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            # A norm is not finite if an element is not, or is too large to train.
            norm = torch.linalg.vector_norm(local(tensor))
            is_finite.setdefault(norm.device, {})[name] = norm.isfinite()
    if not is_finite:
        return []
    # One copy for all on the host.
    flags = torch.cat([torch.stack([*of.values()]).to(device) for of in is_finite.values()]).int()
    dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    names = (name for of in is_finite.values() for name in of)
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if not flag]


def sum_packed(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    """Sums each tensor over the shards of `like`, in one collective of all ranks.

    Returns `tensors` if one rank holds all of `like`.
    """
    group, replicas = all_ranks_group(like), replica_group(like)
    if group is None or not tensors:
        return tensors
    with region("reduce"):
        packed = torch.cat([tensor.flatten() for tensor in tensors])
        # Not shards, then replicas: ranks of one replica need equal bits too.
        dist.all_reduce(packed, group=group)
    if replicas is not None:
        packed /= replicas.size()
    return cut(packed, [tensor.shape for tensor in tensors])


def sum_rows(summand: Tensor, like: Tensor) -> Tensor:
    """Sums a matrix [ranks x rows, width] over the shards of `like`; returns this rank's rows."""
    shards, replicas = shard_group(like), replica_group(like)
    if shards is None:
        return summand
    with region("reduce"):
        own = summand.new_empty(len(summand) // shards.size(), *summand.shape[1:])
        dist.reduce_scatter_single(own, summand, group=shards)
        if replicas is not None:
            dist.all_reduce(own, group=replicas)
            own /= replicas.size()
    return own
