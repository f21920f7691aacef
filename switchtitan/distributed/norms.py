"""Norms of tensors that are sharded over ranks."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import local, shard_group


def total_norm(tensors: Sequence[Tensor], loss: Tensor | None = None) -> Tensor:
    """Returns the 2-norm of all elements of all tensors, 0-dim; collective over their shards.

    All tensors are sharded over the same ranks, or none is.

    Args:
        loss: 0-dim, this rank's. If it is not finite on any of those ranks, the norm is nan.
    """
    # Norms of tensors first: the sum of all squares could overflow, and rounds more.
    norms = torch.stack(torch._foreach_norm([local(tensor) for tensor in tensors]))
    # Zero, or nan if the loss is not finite. Sent with the norms, in one message.
    zero = norms.new_zeros(()) if loss is None else loss * 0
    group = shard_group(tensors[0])
    # Squaring and its root round, so one rank, as in torch, does without.
    if group is not None and group.size() > 1:
        summed = torch.cat([norms.square_(), zero[None]])
        dist.all_reduce(summed, group=group)
        norms, zero = summed[:-1].sqrt_(), summed[-1]
    return torch.linalg.vector_norm(norms) + zero


def non_finite(tensors: Mapping[str, Tensor], device: torch.device) -> list[str]:
    """Returns the names of floating-point tensors with an inf or nan on any rank.

    The same names on every rank: collective over all ranks; waits for the device.

    Args:
        device: the one that the default group communicates.
    """
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return []
    # Sums of squares, which are not finite if an element is not, or is too large to train.
    norms = [torch.linalg.vector_norm(local(tensor)).to(device) for tensor in floating.values()]
    spoiled = (~torch.isfinite(torch.stack(norms))).to(torch.int32)
    if dist.is_initialized():
        dist.all_reduce(spoiled, op=dist.ReduceOp.MAX)
    return [name for name, is_spoiled in zip(floating, spoiled.tolist(), strict=True) if is_spoiled]
