"""The ranks of this run: who we are, our device, our process group and mesh. The one place that tells CPU from CUDA."""

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
from switchtitan.errors import EnvironmentMismatchError

_TIMEOUT = timedelta(minutes=30)
"""After which a collective that other ranks do not join fails."""


@dataclass(frozen=True)
class World:
    """All ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Dimensions "replicate" and "shard"."""
    patient_group: dist.ProcessGroup
    """All ranks, over gloo, for waits of any length."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def num_replicas(self) -> int:
        """How often the whole model is there."""
        return self.mesh.size(0)

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh for FSDP: one-dimensional, or [replicate, shard] where the model is replicated too (HSDP)."""
        return self.mesh if self.num_replicas > 1 else self.mesh["shard"]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of `values` over all ranks, on all ranks."""
        return self.sum(values) / self.size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, on all ranks; the argument is left alone."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        """The main rank's `value`, a picklable object, on all ranks, however long it takes until the main rank has it."""
        values = [value]
        dist.broadcast_object_list(
            values, src=0, group=self.patient_group, device=torch.device("cpu")
        )
        return values[0]

    def synchronize(self) -> None:
        """Waits until this rank's device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_type() -> str:
    """ "cuda" where a CUDA device is visible, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def num_ranks_from_launcher() -> int:
    """The number of ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mesh_shape(config: ParallelismConfig, num_ranks: int) -> tuple[int, int]:
    """(replicate, shard) for `num_ranks` ranks.

    Raises:
        EnvironmentMismatchError: if the ranks cannot be divided so.
    """
    shard = num_ranks // config.replicate if config.shard == -1 else config.shard
    if shard < 1 or config.replicate * shard != num_ranks:
        raise EnvironmentMismatchError(
            f"[parallelism] replicate = {config.replicate}, shard = {config.shard}: replicate x shard must be the number of "
            f"ranks, {num_ranks}; set shard = -1 and a replicate that divides it, or start another number of ranks (NGPU)"
        )
    return config.replicate, shard


def start_world(config: ParallelismConfig) -> World:
    """Joins the process group that torchrun's environment describes, or makes one of a single rank."""
    num_ranks, rank = num_ranks_from_launcher(), int(os.environ.get("RANK", "0"))
    shape = mesh_shape(config, num_ranks)
    device = torch.device(device_type())
    if device.type == "cuda":
        local_rank, num_devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= num_devices:
            raise EnvironmentMismatchError(
                f"rank {local_rank} of this machine has no GPU: {num_devices} are visible; set NGPU to {num_devices} at most"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo carries the checkpoints' collectives beside NCCL.
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
    patient_group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return World(rank=rank, size=num_ranks, device=device, mesh=mesh, patient_group=patient_group)


@contextmanager
def world_for_a_while() -> Iterator[None]:
    """Leaves, at its end, the process group that is joined inside; one that was there before stays.

    After an error only where this rank is alone in it: leaving waits for the others, which may be waiting for this one.
    """
    was_joined = dist.is_initialized()
    try:
        yield
    except BaseException:
        if not was_joined:
            stop_world_if_alone()
        raise
    if not was_joined:
        stop_world()


def stop_world() -> None:
    """Leaves the process group; every rank must. With NCCL it waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_world_if_alone() -> None:
    """Leaves the process group where this rank is the only one in it: after an error, others may be waiting for it."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        stop_world()


def device_name(device: torch.device) -> str:
    """What the device calls itself, e.g. "NVIDIA H100 80GB HBM3"; "CPU" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
