"""Tensors that several ranks keep, and change each by itself in the same way: whether they are still the same."""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError, abbreviate


def check_replicas(tensors: Mapping[str, Tensor]) -> None:
    """Compares fingerprints of what ranks hold alike, by name: of plain tensors over all ranks, of the parts of DTensors over
    the replicas of their mesh. Ranks that hold different parts are not compared. All must call; waits for the device.

    Raises:
        RanksDisagreeError: on every rank, if a tensor differs; names the first few.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    held_alike = {name: tensor for name, tensor in tensors.items() if _num_replicas(tensor) > 1}
    if not held_alike:
        return
    own = [fingerprint(local(tensor)) for tensor in held_alike.values()]
    device = own[0].device
    # A place for each part of each tensor, so that one collective tells all ranks.
    names, own_places = list[str](), list[int]()
    for name, tensor in held_alike.items():
        part, num_parts = _part(tensor)
        own_places.append(len(names) + part)
        names += [name] * num_parts
    values = torch.stack([value.to(device) for value in own])
    # The largest, and the complement of the smallest.
    extremes = torch.full((2, len(names)), torch.iinfo(torch.int64).min, device=device)
    extremes[:, torch.tensor(own_places, device=device)] = torch.stack([values, ~values])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    differ = (extremes[0] != ~extremes[1]).tolist()
    differing = list(
        dict.fromkeys(name for name, differs in zip(names, differ, strict=True) if differs)
    )
    if differing:
        raise RanksDisagreeError(
            f"ranks no longer hold the same weights ({abbreviate(differing)}), so what they train is "
            "not one model; nothing more is saved. "
            "Resume all ranks from the newest checkpoint, on devices of one kind, or set [parallelism] "
            'frozen_weights = "shard" and replicate = 1'
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """A 0-dim int64 that a change of any one value changes, and in all likelihood any other change, of places too."""
    bits = tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).view(
        _INTEGERS[tensor.element_size()]
    )
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    # Together each value has an odd factor, of which no bit of the value is lost; products and sums wrap around.
    row_factors = (2 * torch.arange(len(rows), device=rows.device) + 1) * _MULTIPLIERS[0]
    column_factors = 2 * torch.arange(len(columns), device=columns.device) * _MULTIPLIERS[1]
    return (rows * row_factors).sum() + (columns * column_factors).sum()


def _num_replicas(tensor: Tensor) -> int:
    """The number of ranks that hold what this rank holds of `tensor`."""
    return dist.get_world_size() // _part(tensor)[1]


def _part(tensor: Tensor) -> tuple[int, int]:
    """Which part of `tensor` this rank holds, and of how many."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


# 2^64 and 2^63 over the golden ratio, made odd.
_MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, 0x4F1BBCDCBFA53E0B
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
