"""The ranks of this run: this rank, its device, process groups and mesh."""

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


@dataclass(eq=False)
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
    """After which a collective fails if a rank has not joined it; see `set_timeout`."""
    is_node_main: bool = True
    """Whether this is the first rank of its machine."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The mesh for FSDP: [shard], or [replicate, shard] with several replicas (HSDP)."""
        return self.mesh if self.mesh.size(0) > 1 else self.mesh["shard"]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum of `values` over all ranks; collective, not in place."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Returns the picklable `value` of every rank, in rank order; may take days."""
        values: list[Any] = [None] * self.size
        # Not a group of its own, which would connect all ranks once more.
        _set_timeout(self.host_group, _LONG_TIMEOUT)
        try:
            dist.all_gather_object(values, value, group=self.host_group)
        finally:
            _set_timeout(self.host_group, self.timeout)
        return values

    def together(self, function: Callable[[], T]) -> list[T]:
        """Calls `function` on every rank; returns the results of all, in rank order; may take days.

        If it raises on a rank, all ranks raise: that rank's UserError, or a RuntimeError.
        """
        result: T | None = None
        error: Exception | None = None
        failure: Exception | None = None
        where = f"rank {self.rank} on {socket.gethostname()}: " if self.rank else ""
        try:
            result = function()
        except UserError as caught:
            error, failure = caught, type(caught)(f"{where}{caught}")
        except Exception as caught:
            text = f"{where or 'rank 0: '}{type(caught).__name__}: {caught}"
            error, failure = caught, RuntimeError(text)
        outcomes = self.gather((result, failure))
        if error is not None and not isinstance(error, UserError):
            raise error
        first = next((failure for _, failure in outcomes if failure is not None), None)
        if first is not None:
            raise first from error
        return [cast(T, outcome) for outcome, _ in outcomes]

    def on_main(self, function: Callable[[], T]) -> T:
        """Calls `function` on the main rank; returns its result on every rank, like `together`."""
        return cast(T, self.together(lambda: function() if self.is_main else None)[0])

    def set_timeout(self, timeout_s: float) -> None:
        """Changes the timeout of later collectives in the groups of this world; collective."""
        # First all ranks complete what they have begun with the earlier one.
        self.together(self.synchronize)
        self.timeout = timedelta(seconds=timeout_s)
        for group in (dist.group.WORLD, self.host_group, *self.mesh.get_all_groups()):
            _set_timeout(group, self.timeout)

    def synchronize(self) -> None:
        """Waits until this rank's device has completed all queued work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def start_world(config: ParallelismConfig) -> World:
    """Joins the process group of the launcher's environment, or creates one of a single rank.
    Raises an EnvironmentMismatchError if launcher, machine and configuration do not fit each
    other."""
    rank, num_ranks, local_rank = place_from_launcher()
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
        # Without a launcher there is nobody to meet.
        store = None if is_launched() else dist.HashStore()
        try:
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=store,
                rank=rank,
                world_size=num_ranks,
                timeout=timeout,
                device_id=device if is_cuda else None,
            )
        except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:
            names = ("RANK", "MASTER_ADDR", "MASTER_PORT")
            given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in names)
            reason = str(error).partition("\n")[0].rstrip(".")
            raise EnvironmentMismatchError(
                f"{given}: {num_ranks} ranks did not meet there ({reason}); {_LAUNCHED}"
            ) from error
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():
        # Groups that are split off get torch's default instead: 10 minutes with NCCL.
        _set_timeout(group, timeout)
    host_group = dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, num_ranks, device, mesh, host_group, timeout, is_node_main=local_rank == 0)


def mesh_shape(config: ParallelismConfig, num_ranks: int) -> tuple[int, int]:
    """Returns (replicate, shard); an EnvironmentMismatchError if they are not `num_ranks` ranks."""
    shard = num_ranks // config.replicate if config.shard == -1 else config.shard
    if shard < 1 or config.replicate * shard != num_ranks:
        raise EnvironmentMismatchError(
            f"[parallelism] replicate = {config.replicate}, shard = {config.shard}: replicate x "
            f"shard must be the number of ranks, {num_ranks}; set shard = -1 and a replicate that "
            "divides it, or start another number of ranks (NGPU)"
        )
    return config.replicate, shard


def _set_timeout(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    # Public since torch 2.15, which warns of the private one.
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    set_timeout(timeout, group)


def raise_file_limit() -> None:
    """Lets this process open as many files as the system allows; each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _limit_other_threads() -> None:
    """Makes CPU operations serial in every thread that starts after this call.

    gloo's threads run parallel operations too. With more OpenMP threads than cores, GNU's barriers
    sleep instead of spin, and every later operation takes longer (docs/LOG.md).
    """
    torch.get_num_threads()  # this thread reads its number before the default changes
    other = threading.Thread(target=torch.set_num_threads, args=(1,))
    other.start()
    other.join()


# Variables in which a launcher tells a process its rank. An empty one counts as unset.
def is_launched() -> bool:
    """Whether a launcher has started this process as one of its ranks."""
    return bool(os.environ.get("WORLD_SIZE"))


def place_from_launcher() -> tuple[int, int, int]:
    """Returns this process's rank, the number of ranks, and its rank on this machine, as its
    launcher says: (0, 1, 0) without one."""
    given = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        num_ranks = int(given["WORLD_SIZE"] or 1)
        rank, local_rank = (int(given[name] or 0) for name in ("RANK", "LOCAL_RANK"))
        # One of several ranks must know which.
        is_place = 0 <= rank < num_ranks and bool(given["RANK"] or num_ranks == 1)
    except ValueError:
        is_place = False
    if not is_place:
        named = ", ".join(f"{name}={value}" for name, value in given.items())
        raise EnvironmentMismatchError(
            f"{named}: expected integers, and a RANK from 0 to WORLD_SIZE - 1; {_LAUNCHED}"
        )
    return rank, num_ranks, local_rank


_LAUNCHED = (
    "start all ranks with ./run_train.sh, which sets WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and "
    "MASTER_PORT; for a single rank, unset them"
)


def check_slurm_tasks(num_nodes: int) -> None:
    """Raises an EnvironmentMismatchError if srun has started this command more often than once per
    machine: each task would train alone. Call where no launcher says how they train together."""
    # srun sets both in its tasks. A batch script has only the first. A shell in an allocation may
    # have the first of the allocation, and 1 as the second.
    counts = [os.environ.get(name, "") for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")]
    num_tasks = min((int(count) if count.isdecimal() else 1) for count in counts)
    if num_tasks > num_nodes:
        raise EnvironmentMismatchError(
            f"SLURM_NTASKS={num_tasks}, NNODES={num_nodes}: srun has started {num_tasks} tasks, "
            "and they would train apart from each other in the same output folder; start one task "
            "per machine with NNODES and RDZV_ENDPOINT, as scripts/slurm/train.sbatch does, or set "
            "RANK, WORLD_SIZE and the other variables of docs/CLUSTERS.md in every task; for "
            "separate runs, unset SLURM_NTASKS in every task"
        )


# Devices.
def device_type() -> str:
    """Returns "cuda" if torch has a CUDA device, "cpu" if the machine has none. Raises an
    EnvironmentMismatchError if the machine has a GPU that torch cannot use."""
    if torch.cuda.is_available():
        return "cuda"
    if problem := unusable_gpu():
        raise EnvironmentMismatchError(problem)
    return "cpu"


def unusable_gpu(driver: Path = Path("/dev/nvidiactl")) -> str | None:
    """Returns what to do if torch sees no GPU, but NVIDIA's driver does and it is not hidden."""
    # Slurm sets NoDevFiles for jobs without GPUs.
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles") or not driver.exists():
        return None
    return (
        f"this machine has a GPU, but torch {torch.__version__} cannot use it; fix the driver, or "
        "install a torch that fits it (pytorch.org/get-started), or set CUDA_VISIBLE_DEVICES= to "
        "train on the CPU"
    )


def own_gpu(local_rank: int) -> torch.device:
    """Returns this rank's GPU: the one with its local rank, or the only one that it sees."""
    num_gpus = torch.cuda.device_count()
    # Slurm can show each task a GPU of its own. Under torchrun all local ranks see the same GPUs.
    if num_gpus == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= num_gpus:
        raise EnvironmentMismatchError(
            f"local rank {local_rank} has no GPU: this machine has {num_gpus}; set NGPU to at most "
            f"{num_gpus}"
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """Returns the device's name, e.g. "NVIDIA H100 80GB HBM3"; "CPU" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# The end.
@contextmanager
def temporary_world() -> Iterator[None]:
    """Destroys, at its end, a process group that was created inside; keeps an earlier one."""
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
    """Destroys the process group; all ranks must call: with NCCL it waits for the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def stop_world_if_single() -> None:
    """Destroys the process group if it has one rank: after an error, other ranks may be waiting."""
    if dist.is_initialized() and dist.get_world_size() == 1:
        stop_world()
