"""Tensors that several ranks hold: one rank computes them for all, or they are checked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from switchtitan.distributed.shards import local, shard_group
from switchtitan.errors import RanksDisagreeError, abbreviate

T = TypeVar("T")


def compute_in_turns(
    collect: Callable[[int], T],
    compute: Callable[[T], Sequence[Tensor]],
    results: Sequence[Sequence[Tensor]],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Iterator[Sequence[Tensor]]:
    """Yields `compute(collect(place))` for each place of `results`; collective over `group`.

    Ranks share the work. Each sends to all what it computes, since devices may differ in roundings.

    Args:
        collect: returns what `compute` needs; all ranks call it, so that it may communicate.
        results: tensors of the shapes and dtypes of what is computed.
        device: the one that the group communicates.
    """
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    for place, like in enumerate(results):
        owner = place % num_ranks
        if owner == 0:
            # All are collected first, so that ranks compute at the same time.
            mine: T | None = None
            for other in range(place, min(place + num_ranks, len(results))):
                collected = collect(other)
                mine = collected if other == place + rank else mine
            if mine is not None:
                own = compute(mine)
        if group is None:
            yield own
            continue
        sent = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in like]
        for index, tensor in enumerate(sent):
            if owner == rank:
                tensor.copy_(own[index])
            dist.broadcast(tensor, group=group, group_src=owner)
        yield sent


def check_replicas(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Compares plain tensors, by name, over all ranks, and shards of DTensors over replicas.

    Reads every tensor twice, and sends a few bytes for each. Collective; waits for the device,
    which the default group communicates. Raises a RanksDisagreeError on every rank if a tensor
    differs, which names the first few.
    """
    num_ranks = dist.get_world_size()
    groups = {name: shard_group(tensor) for name, tensor in tensors.items()}
    num_parts = {name: 1 if group is None else group.size() for name, group in groups.items()}
    names = [name for name in tensors if num_parts[name] < num_ranks]
    if not names:
        return
    own = torch.stack([digest(local(tensors[name])).to(device) for name in names])
    of_ranks = own.new_empty(num_ranks * len(names))
    dist.all_gather_single(of_ranks, own)
    differing = list[str]()
    for name, digests in zip(names, of_ranks.cpu().view(num_ranks, -1).t(), strict=True):
        # Every `num_parts`-th rank holds the same shard.
        by_replica = digests.reshape(-1, num_parts[name])
        if (by_replica != by_replica[0]).any():
            differing.append(name)
    if differing:
        raise RanksDisagreeError(
            f"ranks no longer hold the same values ({abbreviate(differing)}), so they no longer "
            "train one model, and nothing more is saved; resume all ranks from the newest "
            "checkpoint. If devices are of several kinds, use one kind, or set [parallelism] "
            'frozen_weights = "shard" and replicate = 1. If it happens again, test memory and '
            "devices"
        )


def digest(tensor: Tensor) -> Tensor:
    """Returns a 0-dim int64 that any change of one value changes.

    Almost surely so does any other change, such as a permutation.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.view(integers[tensor.element_size()])
    if bits.ndim == 0:
        return bits.to(torch.int64)
    bits = bits.reshape(len(bits), math.prod(bits.shape[1:]))
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    # Each value gets an odd factor, so no bit of it is lost; products and sums wrap around.
    row_factors = (2 * torch.arange(len(rows), device=rows.device) + 1) * _MULTIPLIERS[0]
    column_factors = 2 * torch.arange(len(columns), device=columns.device) * _MULTIPLIERS[1]
    return (rows * row_factors).sum() + (columns * column_factors).sum()


# 2^64 and 2^63 over the golden ratio, made odd.
_MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, 0x4F1BBCDCBFA53E0B
