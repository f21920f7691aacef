"""The ranks of this run: this rank, its device, process groups and mesh.

The only file that distinguishes CPU from CUDA when a run starts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.threads import limit_other_threads
from switchtitan.errors import EnvironmentMismatchError

_TIMEOUT = timedelta(minutes=30)
"""A collective fails if a rank has not joined it after this time."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, as seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Dimensions "replicate" and "shard"."""
    long_timeout_group: dist.ProcessGroup
    """All ranks, over gloo, with a timeout of 30 days."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_replicas(self) -> int:
        """Number of model replicas."""
        return self.mesh.size(0)

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh for FSDP: [shard], or [replicate, shard] with several replicas (HSDP)."""
        return self.mesh if self.num_replicas > 1 else self.mesh["shard"]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the mean of `values` over all ranks; collective."""
        return self.sum(values) / self.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `values` over all ranks; collective, not in place."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        """Returns the main rank's `value`, a picklable object, on all ranks; may take days."""
        values = [value]
        dist.broadcast_object_list(
            values, src=0, group=self.long_timeout_group, device=torch.device("cpu")
        )
        return values[0]

    def synchronize(self) -> None:
        """Waits until this rank's device has completed all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_type() -> str:
    """Returns "cuda" if a CUDA device is visible, otherwise "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def num_ranks_from_launcher() -> int:
    """Returns the number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mesh_shape(config: ParallelismConfig, num_ranks: int) -> tuple[int, int]:
    """Returns (replicate, shard) for `num_ranks` ranks.

    Raises:
        EnvironmentMismatchError: if replicate x shard is not `num_ranks`.
    """
    shard = num_ranks // config.replicate if config.shard == -1 else config.shard
    if shard < 1 or config.replicate * shard != num_ranks:
        raise EnvironmentMismatchError(
            f"[parallelism] replicate = {config.replicate}, shard = {config.shard}: replicate x "
            f"shard must be the number of ranks, {num_ranks}; set shard = -1 and a replicate that "
            "divides it, or start another number of ranks (NGPU)"
        )
    return config.replicate, shard


def start_world(config: ParallelismConfig) -> World:
    """Joins the process group of torchrun's environment, or creates one of a single rank."""
    num_ranks, rank = num_ranks_from_launcher(), int(os.environ.get("RANK", "0"))
    shape = mesh_shape(config, num_ranks)
    device = torch.device(device_type())
    use_full_precision(device.type)
    if device.type == "cuda":
        local_rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise EnvironmentMismatchError(
                f"local rank {local_rank} has no GPU: {num_devices} are visible on this machine; "
                f"set NGPU to {num_devices} at most"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    limit_other_threads()  # before the groups start theirs
    if not dist.is_initialized():
        # Checkpoints use gloo; the training step uses NCCL.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if "WORLD_SIZE" not in os.environ else None
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=num_ranks,
            timeout=_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    long_timeout_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return World(
        rank=rank, size=num_ranks, device=device, mesh=mesh, long_timeout_group=long_timeout_group
    )


@contextmanager
def temporary_world() -> Iterator[None]:
    """Destroys, at its end, a process group that was created inside; keeps an earlier one.

    After an error it does so only for a single rank: destroying the group waits for the other
    ranks, which may be waiting for this one.
    """
    was_joined = dist.is_initialized()
    try:
        yield
    except BaseException:
        if not was_joined:
            stop_world_if_single()
        raise
    if not was_joined:
        stop_world()


def stop_world() -> None:
    """Destroys the process group; all ranks must call. With NCCL it waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_world_if_single() -> None:
    """Destroys the process group if it has one rank: after an error, other ranks may be waiting."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        stop_world()


def device_name(device: torch.device) -> str:
    """Returns the device's name, e.g. "NVIDIA H100 80GB HBM3"; "CPU" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
