"""What of a save each rank writes, and its copy in host memory for a background save."""

import heapq
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from switchtitan.distributed.adjacent import with_local
from switchtitan.distributed.shards import local


class HostCopies:
    """Copies tensors to host memory, and reuses that memory in the next save.

    Copying into memory that is already allocated takes a quarter of the time. Copies of CUDA
    tensors are page-locked: the device writes them directly, in one queue without waiting for each.
    Tensors in host memory are copied too.
    """

    def __init__(self) -> None:
        self._stagers: dict[str, DefaultStager] = {}
        self._parts: dict[str, Tensor] = {}

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies by name, which no longer change. Waits until they are complete."""
        copies: dict[str, Tensor] = {}
        for device_type in sorted({tensor.device.type for tensor in tensors.values()}):
            if device_type not in self._stagers:
                self._stagers[device_type] = DefaultStager(staging_options(device_type))
            # Local shards: torch's stager fails for DTensors that share a storage.
            own = {name: local(t) for name, t in tensors.items() if t.device.type == device_type}
            # The stager would copy their whole storages.
            copies |= self._copy_parts(_parts_of_storages(own), device_type == "cuda")
            staged = self._stagers[device_type].stage(
                {name: tensor for name, tensor in own.items() if name not in copies}
            )
            assert isinstance(staged, dict)
            copies |= staged
        return {name: with_local(tensors[name], copies[name]) for name in tensors}

    def _copy_parts(self, tensors: Mapping[str, Tensor], is_cuda: bool) -> dict[str, Tensor]:
        """Copies each tensor into memory of its own size; waits until all copies are complete."""
        for name, tensor in tensors.items():
            if name not in self._parts:
                self._parts[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda
                )
            self._parts[name].copy_(tensor, non_blocking=is_cuda)
        if is_cuda and tensors:
            torch.cuda.current_stream().synchronize()
        return {name: self._parts[name] for name in tensors}


def _parts_of_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors whose storage holds more than `tensors`.

    Trained matrices of several layers share a storage, and a replica saves a few of them only.
    """
    num_bytes: dict[int, int] = {}
    for tensor in tensors.values():
        key = tensor.untyped_storage()._cdata
        num_bytes[key] = num_bytes.get(key, 0) + tensor.nbytes
    return {
        name: tensor
        for name, tensor in tensors.items()
        if num_bytes[tensor.untyped_storage()._cdata] < tensor.untyped_storage().nbytes()
    }


def staging_options(device_type: str) -> StagingOptions:
    """Returns how to copy tensors of a device; never in another thread or into shared memory."""
    return StagingOptions(
        use_pinned_memory=device_type == "cuda",
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=device_type == "cuda",
    )


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
