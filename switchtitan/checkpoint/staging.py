"""What of a save each rank writes, and its copy in host memory for a background save."""

import heapq
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from switchtitan.distributed.copies import PageLockedMemory
from switchtitan.distributed.shards import local, with_local

_ALIGNMENT = 16
"""Bytes at whose multiples copies start; as long as a GPU's widest access."""


class HostCopies:
    """Copies tensors to host memory, and reuses that memory in the next save.

    Copying into memory that is already allocated takes a quarter of the time. Copies of CUDA
    tensors are page-locked: the device writes them directly, in one queue without waiting for each.
    Tensors in host memory are copied too, at the same time.
    """

    def __init__(self) -> None:
        self._page_locked: PageLockedMemory | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        """Device type -> views of its memory, by name."""

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies by name, which no longer change. Waits until they are complete.

        All copies of a device's tensors share a storage, which has no other bytes than theirs, but
        for the alignment.
        """
        shards: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            shard = local(tensor)
            shards.setdefault(shard.device.type, {})[name] = shard
        copies: dict[str, Tensor] = {}
        # The device copies while the host does.
        for device_type in sorted(shards, key=lambda device_type: device_type != "cuda"):
            own = shards[device_type]
            into = self._memory_for(own, device_type)
            for name, shard in own.items():
                copies[name] = into[name].copy_(shard, non_blocking=True)
        if "cuda" in shards:
            torch.cuda.current_stream().synchronize()
        return {name: with_local(tensors[name], copies[name]) for name in tensors}

    def _memory_for(self, shards: Mapping[str, Tensor], device_type: str) -> dict[str, Tensor]:
        """Returns memory for copies of a device's shards: that of the last call, if it fits."""
        if _shapes(self._copies.get(device_type, {})) != _shapes(shards):
            # Both together may not fit.
            self._copies.pop(device_type, None)
            starts, num_bytes = _lay_out(shards)
            memory = self._allocate(num_bytes, device_type)
            self._copies[device_type] = {
                name: memory[start : start + shards[name].nbytes]
                .view(shards[name].dtype)
                .view(shards[name].shape)
                for name, start in starts.items()
            }
        return self._copies[device_type]

    def _allocate(self, num_bytes: int, device_type: str) -> Tensor:
        if device_type != "cuda":
            return torch.empty(num_bytes, dtype=torch.uint8)
        self._page_locked = None
        self._page_locked = PageLockedMemory(num_bytes)
        return self._page_locked.bytes


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _lay_out(tensors: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Returns where each tensor's copy starts, and the end of the last, in bytes."""
    starts, end = {}, 0
    for name, tensor in tensors.items():
        starts[name] = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = starts[name] + tensor.nbytes
    return starts, end


def own_share(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that this rank saves.

    If several ranks hold the same values, only one of them saves them, so that the others need no
    host memory for a copy. Such ranks get about the same number of bytes. No communication.

    Args:
        tensors: the same names, shapes and layouts on every rank. Plain tensors have the same
            values on every rank, and shards of DTensors on the replicas of their mesh.
    """
    if not dist.is_initialized():
        return dict(tensors)
    # By the number of ranks that hold the same values: (bytes assigned so far, rank among them).
    loads: dict[int, list[tuple[int, int]]] = {}
    is_own: dict[str, bool] = {}
    # The largest first: the remainder then differs by the size of a small tensor.
    for name in sorted(tensors, key=lambda name: (-_num_bytes(tensors[name]), name)):
        index, num_copies = _copy(tensors[name])
        heap = loads.setdefault(num_copies, [(0, copy) for copy in range(num_copies)])
        assigned, chosen = heap[0]
        heapq.heapreplace(heap, (assigned + _num_bytes(tensors[name]), chosen))
        is_own[name] = chosen == index
    return {name: tensor for name, tensor in tensors.items() if is_own[name]}


def _num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.itemsize


def _copy(tensor: Tensor) -> tuple[int, int]:
    """Returns (index among the ranks that hold the same values of `tensor`, number of them)."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank(), dist.get_world_size()
    index, num_copies = 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            index = index * size + tensor.device_mesh.get_local_rank(dimension)
            num_copies *= size
    return index, num_copies
