"""Checks that tensors which several ranks hold and update independently are still equal."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError, abbreviate

_NUM_EXPLAINED = 4
"""Differing tensors for which an error names the ranks."""


def check_replicas(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Compares fingerprints of replicated tensors.

    Compares plain tensors over all ranks, and shards of DTensors over the replicas of their mesh.
    Reads every compared tensor twice, and sends a few bytes for each. Collective over all ranks;
    waits for the device.

    Args:
        tensors: by name.
        device: the one that the default group communicates.

    Raises:
        RanksDisagreeError: on every rank, if a tensor differs; names the first few, and the ranks.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    held_alike = {name: tensor for name, tensor in tensors.items() if _num_replicas(tensor) > 1}
    if not held_alike:
        return
    own = [fingerprint(local(tensor)) for tensor in held_alike.values()]
    # One element for each shard of each tensor, so that one collective informs all ranks.
    names, own_places = list[str](), list[int]()
    for name, tensor in held_alike.items():
        part, num_parts = _part(tensor)
        own_places.append(len(names) + part)
        names += [name] * num_parts
    values = torch.stack([value.to(device) for value in own])
    # The maximum, and the complement of the minimum.
    extremes = torch.full((2, len(names)), torch.iinfo(torch.int64).min, device=device)
    extremes[:, torch.tensor(own_places, device=device)] = torch.stack([values, ~values])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    differing = torch.nonzero(extremes[0] != ~extremes[1]).flatten().tolist()
    if differing:
        explained = differing[:_NUM_EXPLAINED]
        held = dict(zip(own_places, values.tolist(), strict=True))
        reasons = [
            f"{names[place]}: {_explain(of_ranks)}"
            for place, of_ranks in zip(
                explained, _gather_places(held, explained, device), strict=True
            )
        ]
        num_more = len(
            {names[place] for place in differing} - {names[place] for place in explained}
        )
        more = f"; and {num_more} more" if num_more else ""
        raise RanksDisagreeError(
            f"ranks no longer hold the same values ({'; '.join(reasons)}{more}), so they no longer "
            "train one model, and nothing more is saved; resume all ranks from the newest "
            "checkpoint. If devices are of several kinds, use one kind, or set [parallelism] "
            'frozen_weights = "shard" and replicate = 1. If the same rank is named again, test its '
            "memory and device"
        )


def _gather_places(
    own: Mapping[int, int], places: Sequence[int], device: torch.device
) -> list[dict[int, int]]:
    """Returns for each place the fingerprint of every rank that holds it, by rank; collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # Whether a rank holds the place, and its fingerprint. Other ranks add zeros.
    table = torch.zeros(2, num_ranks, len(places), dtype=torch.int64)
    for column, place in enumerate(places):
        if place in own:
            table[:, rank, column] = torch.tensor([1, own[place]])
    table = table.to(device)
    dist.all_reduce(table)
    is_held, fingerprints = table.tolist()
    return [
        {r: fingerprints[r][column] for r in range(num_ranks) if is_held[r][column]}
        for column in range(len(places))
    ]


def _explain(of_ranks: Mapping[int, int]) -> str:
    """Says which ranks differ from the majority, if there is one.

    Args:
        of_ranks: fingerprints by rank.
    """
    groups: dict[int, list[int]] = {}
    for rank, value in of_ranks.items():
        groups.setdefault(value, []).append(rank)
    largest, *others = sorted(groups.values(), key=len, reverse=True)
    if len(largest) > len(others[0]):
        odd = sorted(rank for ranks in others for rank in ranks)
        return f"{_ranks(odd)} against {_ranks(largest)}"
    return " against ".join(map(_ranks, sorted([largest, *others])))


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {abbreviate(map(str, ranks))}"


def fingerprint(tensor: Tensor) -> Tensor:
    """Returns a 0-dim int64 that any change of one value changes.

    Almost surely so does any other change, such as a permutation.
    """
    if tensor.ndim == 0:
        return tensor.view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    bits = _integers(tensor.reshape(len(tensor), math.prod(tensor.shape[1:])))
    rows, columns = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    # Each value gets an odd factor, so no bit of it is lost; products and sums wrap around.
    row_factors = (2 * torch.arange(len(rows), device=rows.device) + 1) * _MULTIPLIERS[0]
    column_factors = 2 * torch.arange(len(columns), device=columns.device) * _MULTIPLIERS[1]
    return (rows * row_factors).sum() + (columns * column_factors).sum()


def _integers(matrix: Tensor) -> Tensor:
    """Returns the bits of a matrix as integers, [rows, columns].

    Of 64 bits, if they divide a row: summing casts smaller ones, which takes a CPU four times as
    long.
    """
    row_bytes = matrix.shape[1] * matrix.element_size()
    if row_bytes % 8 or row_bytes == 0:
        return matrix.view(_INTEGERS[matrix.element_size()])
    is_aligned = matrix.storage_offset() * matrix.element_size() % 8 == 0
    if not (matrix.is_contiguous() and is_aligned):
        matrix = matrix.clone(memory_format=torch.contiguous_format)
    return matrix.view(torch.int64)


def _num_replicas(tensor: Tensor) -> int:
    """Number of ranks that hold the same shard of `tensor` as this rank."""
    return dist.get_world_size() // _part(tensor)[1]


def _part(tensor: Tensor) -> tuple[int, int]:
    """Returns (index of this rank's shard of `tensor`, number of shards)."""
    if not isinstance(tensor, DTensor):
        return 0, 1
    mesh = tensor.device_mesh
    return mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)


# 2^64 and 2^63 over the golden ratio, made odd.
_MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, 0x4F1BBCDCBFA53E0B
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
