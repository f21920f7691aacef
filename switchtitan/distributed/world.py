"""The ranks of this run: this rank, its device, process groups and mesh.

The only file that distinguishes CPU from CUDA when a run starts.
"""

import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.precision import use_full_precision
from switchtitan.errors import EnvironmentMismatchError, UserError

T = TypeVar("T")

_LONG_TIMEOUT = timedelta(days=30)
"""For collectives in which ranks wait for hours of another rank's work."""


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

    def gather(self, value: T) -> list[T]:
        """Returns the picklable `value` of every rank, in rank order; may take days."""
        values: list[Any] = [None] * self.size
        # Not a group of its own: each gloo group has a connection to every other rank.
        _set_timeout(self.host_group, _LONG_TIMEOUT)
        try:
            dist.all_gather_object(values, value, group=self.host_group)
        finally:
            _set_timeout(self.host_group, self.timeout)
        return values

    def broadcast(self, value: T) -> T:
        """Returns the main rank's picklable `value` on all ranks; may take days."""
        return self.gather(value)[0]

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
        outcomes = self.gather((result, None if error is None else _reason(error, self.rank)))
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

    def synchronize(self) -> None:
        """Waits until this rank's device has completed all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _reason(error: Exception, rank: int) -> tuple[type[Exception], str]:
    """Returns what other ranks raise for `error`."""
    where = "" if rank == 0 else f"rank {rank} on {socket.gethostname()}: "
    if isinstance(error, UserError):
        return type(error), f"{where}{error}"
    return RuntimeError, f"{where or 'rank 0: '}{type(error).__name__}: {error}"


def start_world(config: ParallelismConfig) -> World:
    """Joins the process group of the launcher's environment, or creates one of a single rank.

    Raises:
        EnvironmentMismatchError: if launcher, machine and configuration do not fit each other.
    """
    num_ranks, rank = num_ranks_from_launcher(), rank_from_launcher()
    local_rank = _from_launcher("LOCAL_RANK", 0)
    shape = mesh_shape(config, num_ranks)
    is_cuda = device_type() == "cuda"
    device = own_gpu(local_rank) if is_cuda else torch.device("cpu")
    use_full_precision(device.type)
    raise_file_limit()
    if is_cuda:
        torch.cuda.set_device(device)
    _limit_other_threads()  # before the groups start theirs
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=_build_store(rank, num_ranks, timeout),
            rank=rank,
            world_size=num_ranks,
            timeout=timeout,
            device_id=device if is_cuda else None,
        )
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for dimension in mesh.mesh_dim_names or ():
        # Groups that are split off get torch's default instead: 10 minutes with NCCL.
        _set_timeout(mesh.get_group(dimension), timeout)
    return World(
        rank,
        num_ranks,
        device,
        mesh,
        host_group=dist.new_group(backend="gloo", timeout=timeout),
        timeout=timeout,
        is_node_main=local_rank == 0,
        num_local_ranks=_from_launcher("LOCAL_WORLD_SIZE", num_ranks),
    )


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


def _build_store(rank: int, num_ranks: int, timeout: timedelta) -> dist.Store:
    """Returns the store of torchrun's environment, or of this process alone."""
    if not is_launched():
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, num_ranks, timeout=timeout))
    except (ValueError, dist.DistError) as error:
        names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EnvironmentMismatchError(
            f"{given}: {num_ranks} ranks did not meet there ({reason}); start all of them with "
            "their RANK and one MASTER_ADDR and MASTER_PORT, a free port that the others reach; "
            "./run_train.sh sets all three"
        ) from error
    return dist.PrefixStore("switchtitan", store)


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Torch 2.15 made the function public and warns of the private one, all that 2.13 has."""
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def raise_file_limit() -> None:
    """Lets this process open as many files as the system allows it: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _limit_other_threads() -> None:
    """Makes CPU operations serial in every thread that starts after this call.

    OpenMP gives each thread that runs a parallel operation a team, as gloo's do to copy an object
    of more than 32 KiB. With more team members than cores, GNU's OpenMP makes all barriers sleep
    instead of spin, so every later operation of this thread would take longer (docs/LOG.md).
    """
    torch.get_num_threads()  # this thread reads its number before the default changes
    other = threading.Thread(target=torch.set_num_threads, args=(1,), name="limit-threads")
    other.start()
    other.join()


# Variables in which a launcher tells a process its rank. An empty one counts as unset.
def is_launched() -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return bool(os.environ.get("WORLD_SIZE"))


def num_ranks_from_launcher() -> int:
    """Returns the number of ranks that the launcher started; 1 without a launcher."""
    return _from_launcher("WORLD_SIZE", 1)


def rank_from_launcher() -> int:
    """Returns this process's rank; 0 without a launcher."""
    rank, num_ranks = _from_launcher("RANK", 0), num_ranks_from_launcher()
    if not 0 <= rank < num_ranks:
        raise EnvironmentMismatchError(
            f"RANK={rank}: expected a rank below WORLD_SIZE={num_ranks}; {_LAUNCHED}"
        )
    return rank


def _from_launcher(name: str, default: int) -> int:
    given = os.environ.get(name) or default
    try:
        return int(given)
    except ValueError as error:
        raise EnvironmentMismatchError(
            f"{name}={given}: expected an integer; {_LAUNCHED}"
        ) from error


_LAUNCHED = (
    "a launcher sets it for every rank, as ./run_train.sh does; without a launcher, unset it"
)


# Devices.
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


def unusable_gpu(driver: Path = Path("/dev/nvidiactl")) -> str | None:
    """Returns why torch, which sees no GPU, cannot use this machine's, and what to do.

    None if there is none, or CUDA_VISIBLE_DEVICES hides it.

    Args:
        driver: the device file of NVIDIA's driver.
    """
    # Slurm sets NoDevFiles for jobs without GPUs.
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles") or not driver.exists():
        return None
    try:
        torch.cuda.init()
        reason = "torch.cuda.is_available() is false"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].strip().rstrip(".")
    return (
        f"this machine has a GPU, but torch {torch.__version__} cannot use it ({reason}); fix "
        "the driver, or install a torch that fits it (pytorch.org/get-started), or set "
        "CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def own_gpu(local_rank: int) -> torch.device:
    """Returns this rank's GPU: the one with its local rank, or the only one that it sees."""
    num_gpus = torch.cuda.device_count()
    # Slurm can show each task a GPU of its own. Under torchrun all local ranks see the same GPUs.
    if num_gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise EnvironmentMismatchError(
            f"local rank {local_rank} has no GPU: {num_gpus} are visible on this machine; "
            f"set NGPU to {num_gpus} at most"
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Returns the device's name, e.g. "NVIDIA H100 80GB HBM3"; "CPU" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# The end.
@contextmanager
def temporary_world() -> Iterator[None]:
    """Destroys, at its end, a process group that was created inside; keeps an earlier one.

    After an error only that of a single rank, see `stop_world_if_single`.
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
