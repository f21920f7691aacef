"""The ranks of this run: this rank, its device, process groups and mesh.

The only file that distinguishes CPU from CUDA when a run starts.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.gpus import own_gpu, unusable_gpu
from switchtitan.distributed.launcher import (
    is_launched,
    local_rank_from_launcher,
    num_local_ranks_from_launcher,
    num_ranks_from_launcher,
    rank_from_launcher,
)
from switchtitan.distributed.limits import raise_file_limit
from switchtitan.distributed.precision import use_full_precision
from switchtitan.distributed.threads import limit_other_threads
from switchtitan.errors import EnvironmentMismatchError, UserError

T = TypeVar("T")

_LONG_TIMEOUT = timedelta(days=30)
"""For collectives in which ranks wait for hours of another rank's work."""


def set_group_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Sets the time after which a collective of the group fails.

    Torch 2.15 made the function public and warns of the private one, all that 2.13 has.
    """
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


@dataclass(frozen=True)
class World:
    """All ranks of a run, as seen from one of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Dimensions "replicate" and "shard"."""
    host_group: dist.ProcessGroup
    """All ranks, over gloo: for Python objects, on CUDA too. For the main thread only."""
    timeout: timedelta = timedelta(minutes=30)
    """A collective fails if a rank has not joined it after this time."""
    is_node_main: bool = True
    """Whether this is the first rank of its machine."""
    num_local_ranks: int = 1
    """Number of ranks on this machine."""

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
        with self._long_timeout():
            dist.broadcast_object_list(
                values, src=0, group=self.host_group, device=torch.device("cpu")
            )
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Returns the picklable `value` of every rank, in rank order; may take days."""
        values: list[Any] = [None] * self.size
        with self._long_timeout():
            dist.all_gather_object(values, value, group=self.host_group)
        return values

    def together(self, function: Callable[[], T]) -> list[T]:
        """Calls `function` on every rank; returns the results of all, in rank order; may take days.

        Raises:
            UserError: on every rank, if any raised one: the one of the first such rank.
            RuntimeError: if another rank raised a different error.
        """
        result, error = None, None
        try:
            result = function()
        except Exception as caught:
            error = caught
        reason = None if error is None else _reason(error, self.rank)
        outcomes = self.gather((result, reason))
        if error is not None and not isinstance(error, UserError):
            raise error
        first = next((reason for _, reason in outcomes if reason is not None), None)
        if first is not None:
            error_type, message = first
            raise error_type(message) from error
        return [cast(T, outcome) for outcome, _ in outcomes]

    def new_host_group(self) -> dist.ProcessGroup:
        """Returns another group of all ranks over gloo, for a thread; collective."""
        return dist.new_group(backend="gloo", timeout=self.timeout)

    @contextmanager
    def _long_timeout(self) -> Iterator[None]:
        # Not a group of its own: each gloo group has a connection to every other rank.
        set_group_timeout(self.host_group, _LONG_TIMEOUT)
        try:
            yield
        finally:
            set_group_timeout(self.host_group, self.timeout)

    def synchronize(self) -> None:
        """Waits until this rank's device has completed all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def device_type() -> str:
    """Returns "cuda" if a CUDA device is visible, otherwise "cpu".

    Raises:
        EnvironmentMismatchError: if the machine has a GPU that torch cannot use.
    """
    if torch.cuda.is_available():
        return "cuda"
    obstacle = unusable_gpu()
    if obstacle is not None:
        raise EnvironmentMismatchError(obstacle)
    return "cpu"


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
    """Joins the process group of the launcher's environment, or creates one of a single rank."""
    num_ranks, rank = num_ranks_from_launcher(), rank_from_launcher()
    shape = mesh_shape(config, num_ranks)
    device = own_gpu() if device_type() == "cuda" else torch.device("cpu")
    use_full_precision(device.type)
    raise_file_limit(num_ranks, device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit_other_threads()  # before the groups start theirs
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_build_store(device.type, rank, num_ranks, timeout),
            rank=rank,
            world_size=num_ranks,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for dimension in mesh.mesh_dim_names or ():
        # Groups that are split off get torch's default instead: 10 minutes with NCCL.
        set_group_timeout(mesh.get_group(dimension), timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(
        rank,
        num_ranks,
        device,
        mesh,
        host_group,
        timeout,
        is_node_main=local_rank_from_launcher() == 0,
        num_local_ranks=num_local_ranks_from_launcher(),
    )


def _build_store(device: str, rank: int, num_ranks: int, timeout: timedelta) -> dist.Store:
    """Returns the store of torchrun's environment, or of this process alone.

    Raises:
        EnvironmentMismatchError: if the environment is incomplete, or the ranks do not meet.
    """
    if not is_launched():
        return dist.HashStore()
    names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise EnvironmentMismatchError(
            f"WORLD_SIZE={num_ranks} is set, but not {', '.join(missing)}; a launcher must set all "
            "four for every rank; ./run_train.sh does"
        )
    store: dist.Store
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, num_ranks, timeout=timeout))
    except (ValueError, dist.DistError) as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EnvironmentMismatchError(
            f"{place}: {num_ranks} ranks did not meet there ({reason}); start all of them with "
            "these values, on a port that is free on MASTER_ADDR and reachable from the others"
        ) from error
    store = dist.PrefixStore("switchtitan", store)
    check_devices_alike(store, device, num_ranks, timeout)
    return store


def check_devices_alike(store: dist.Store, device: str, num_ranks: int, timeout: timedelta) -> None:
    """Checks that all ranks have a GPU, or none; ranks that differ would wait for each other.

    Args:
        device: this rank's, "cpu" or "cuda".

    Raises:
        EnvironmentMismatchError: on every rank, if some ranks have no GPU.
    """
    store.add("gpus", device == "cuda")
    if store.add("ranks", 1) == num_ranks:
        # Read again: others may have added since this rank did.
        store.set("num_gpus", str(store.add("gpus", 0)))
    store.wait(["num_gpus"], timeout)
    num_gpus = int(store.get("num_gpus"))
    if num_gpus not in (0, num_ranks):
        raise EnvironmentMismatchError(
            f"{num_gpus} of {num_ranks} ranks have a GPU; start them on machines with GPUs only, "
            "or set CUDA_VISIBLE_DEVICES= on all of them to train on CPUs"
        )


def _reason(error: Exception, rank: int) -> tuple[type[Exception], str]:
    """Returns what other ranks raise for `error`."""
    where = "" if rank == 0 else f"rank {rank} on {socket.gethostname()}: "
    if isinstance(error, UserError):
        return type(error), f"{where}{error}"
    return RuntimeError, f"{where or 'rank 0: '}{type(error).__name__}: {error}"


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
