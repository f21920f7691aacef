"""Tensors that several ranks hold: one rank computes them for all, or they are checked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.distributed.shards import local
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
    """Compares plain tensors over all ranks, and shards of DTensors over their mesh's replicas.

    Reads every tensor twice, and sends a few bytes for each. Collective; waits for the device.

    Args:
        tensors: by name.
        device: the one that the default group communicates.

    Raises:
        RanksDisagreeError: on every rank, if a tensor differs; names the first few.
    """
    num_ranks = dist.get_world_size()
    held_alike = {name: part for name, part in tensors.items() if _part(part)[1] < num_ranks}
    if not held_alike:
        return
    # One element for each shard of each tensor, so that one collective informs all ranks.
    names, own_places = list[str](), list[int]()
    for name, tensor in held_alike.items():
        part, num_parts = _part(tensor)
        own_places.append(len(names) + part)
        names += [name] * num_parts
    own = torch.stack([digest(local(tensor)).to(device) for tensor in held_alike.values()])
    # The maximum, and the complement of the minimum.
    extremes = torch.full((2, len(names)), torch.iinfo(torch.int64).min, device=device)
    extremes[:, torch.tensor(own_places, device=device)] = torch.stack([own, ~own])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    differing = (extremes[0] != ~extremes[1]).tolist()
    if any(differing):
        found = {name: None for name, differs in zip(names, differing, strict=True) if differs}
        raise RanksDisagreeError(
            f"ranks no longer hold the same values ({abbreviate(found)}), so they no longer train "
            "one model, and nothing more is saved; resume all ranks from the newest checkpoint. If "
            "devices are of several kinds, use one kind, or set [parallelism] frozen_weights = "
            '"shard" and replicate = 1. If it happens again, test memory and devices'
        )


def _part(tensor: Tensor) -> tuple[int, int]:
    """Returns (index of this rank's shard of `tensor`, number of shards)."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


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
