"""The tensors of a checkpoint: in the run, copied to the host, and on disk.

torch.distributed.checkpoint (DCP) writes and reads them. What is ours: checksums of what is
written, and a reader that runs no code of a file.
"""

import hashlib
import io
import os
import pickle
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, filesystem, metadata
from torch.distributed.tensor import DTensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.norms import non_finite
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.shards import local, with_local
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import named_errors

TENSOR_FILES = r"__\d+_\d+\.distcp|\.metadata"
"""A pattern of the names of the files that DCP writes: one for each rank, and the index."""
_MODEL, _OPTIMIZER = "model.", "optimizer."
_READABLE = {
    *((metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""(module, name) of all that DCP's index consists of, besides dtypes. Exact: a prefix would allow
("torch.distributed.checkpoint.filesystem", "os.system")."""


class CheckpointTensors:
    """All tensors of a run's checkpoint, sharing memory with the model and the optimizer.

    Build it while parameters are sharded: FSDP replaces them during forward passes.
    """

    def __init__(self, model: nn.Module, optimizer: TrainingOptimizer) -> None:
        self._optimizer = optimizer
        self._device = next(model.parameters()).device
        state = model.state_dict(keep_vars=True)
        self._of_model = {f"{_MODEL}{name}": tensor.detach() for name, tensor in state.items()}

    def __call__(self) -> dict[str, Tensor]:
        """Returns all tensors by name, with the current optimizer state."""
        return self._of_model | _prefixed(self._optimizer.state_dict())

    def held(self, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Returns all `tensors` by name, and values outside the state that every rank computes."""
        return dict(tensors or self()) | _prefixed(self._optimizer.replicated())

    def restore(self, checkpoint: Path, world: World) -> None:
        """Loads model and optimizer from a checkpoint of any number of ranks; collective."""
        tensors = self()
        world.together(lambda: load_tensors_(checkpoint, tensors))
        own = {name: tensors[name] for name in tensors if name.startswith(_OPTIMIZER)}
        self._optimizer.load_state_dict({name.removeprefix(_OPTIMIZER): own[name] for name in own})

    def check_replicas(self) -> None:
        """Compares the model's replicas, see `replicas.check_replicas`."""
        # The default group of CUDA ranks does not communicate buffers that stay in host memory.
        check_replicas(self._of_model, self._device)

    def check_state(
        self, numbers: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Compares replicas of model, optimizer, and further plain tensors on any device.

        Args:
            tensors: what this object returned; by default it is collected, which can take time.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            check_replicas(self.held(tensors) | dict(numbers), self._device)

    def non_finite(self) -> list[str]:
        """Returns the names of the model's tensors with an inf or nan, see `norms.non_finite`."""
        return non_finite(self._of_model, self._device)


def _prefixed(of_optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{_OPTIMIZER}{name}": tensor for name, tensor in of_optimizer.items()}


def own_share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Returns the tensors of which this rank writes what it holds; others write all others.

    Of the ranks that hold the same, a hash of the name chooses one.
    """
    share = {}
    for name, tensor in tensors.items():
        num_replicas, replica = _replica(tensor, world)
        if zlib.crc32(name.encode()) % num_replicas == replica:
            share[name] = tensor
    return share


def _replica(tensor: Tensor, world: World) -> tuple[int, int]:
    """Returns how many ranks hold what this rank holds of a tensor, and its index among them."""
    if not isinstance(tensor, DTensor):
        return world.size, world.rank
    mesh = tensor.device_mesh
    # A mesh of shards alone is that of one replica.
    num_replicas, replica = world.size // mesh.size(), world.rank // mesh.size()
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            num_replicas *= mesh.size(dim)
            replica = replica * mesh.size(dim) + mesh.get_local_rank(dim)
    return num_replicas, replica


# Copies on the host.
@torch.no_grad()
def copy_to_host(tensors: Mapping[str, Tensor], reused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the local shards on the host, complete; the host waits once for all.

    Args:
        reused: host memory by name, page-locked for tensors on CUDA; what is missing is added.
            Writing to memory that is already allocated takes a quarter of the time.
    """
    shards = {name: local(tensor) for name, tensor in tensors.items()}
    for name, shard in shards.items():
        held = reused.get(name)
        if held is None or (held.shape, held.dtype) != (shard.shape, shard.dtype):
            # Page-locked memory is reserved in powers of two.
            reused[name] = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda)
        reused[name].copy_(shard, non_blocking=True)
    if any(shard.is_cuda for shard in shards.values()):
        torch.cuda.current_stream().synchronize()
    return {name: with_local(tensor, reused[name]) for name, tensor in tensors.items()}


# Writing.
def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup
) -> dict[str, str]:
    """Writes tensors to `folder`, flushed to disk; collective over `group`.

    What several ranks hold is written once. Returns checksums of this rank's files by name.
    """
    writer = _Writer(folder)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, OSError) for cause in causes.values()):
            raise RuntimeError(str(error)) from error
        reasons = (f"on rank {rank}: {cause}" for rank, cause in causes.items())
        raise CheckpointError("; ".join(reasons)) from error
    return writer.files.sums


class _Writer(filesystem.FileSystemWriter):
    """Writes a file per rank, and the index on the coordinator, all flushed and hashed."""

    def __init__(self, folder: Path) -> None:
        # Copy-ahead would wait for the stream of device 0, on which training runs, or create a CUDA
        # context there on every rank.
        super().__init__(folder, sync_files=True, overwrite=False, per_thread_copy_ahead=0)
        self.fs = self.files = _HashedFiles()

    def storage_meta(self) -> metadata.StorageMeta:
        # DCP's version contains the folder, which is renamed later.
        return metadata.StorageMeta(save_id=self.save_id)


class _HashedFiles(filesystem.FileSystem):
    """Files, and checksums of what was written, whatever a disk makes of it."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        file = Path(path)
        with named_errors(file), _HashedFile(file, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:  # torch.save hides an OSError behind it
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        # DCP renames the index.
        self.sums[file.name.removesuffix(".tmp")] = stream.digest.hexdigest()


class _HashedFile(io.FileIO):
    """Not buffered: DCP flushes a file to disk before it closes it."""

    def __init__(self, file: Path, mode: str) -> None:
        super().__init__(file, mode)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        self.digest.update(rest)
        while rest:
            rest = rest[super().write(rest) :]
        return num_bytes


# Reading a verified checkpoint; not collective.
def files_of_tensors(path: Path) -> set[str]:
    """Returns the names of the files that the index refers to."""
    with reading(path):
        return {
            piece.relative_path for piece in _Reader(path).read_metadata().storage_data.values()
        }


def saved_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors by name, on the meta device."""
    with reading(path):
        saved: dict[str, Any] = _Reader(path).read_metadata().state_dict_metadata
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in saved.items()
        }


def read_tensors(path: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns full tensors by name, on the CPU."""
    saved = saved_tensors(path)
    with reading(path):
        tensors = {name: torch.empty_like(saved[name], device="cpu") for name in names}
    _read_(path, tensors)
    return tensors


def load_tensors_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills all of a checkpoint's `tensors` in place; DTensors may be sharded differently.

    Raises:
        CheckpointError: before any tensor changes, if names, shapes or dtypes differ.
    """
    saved, expected = _described(saved_tensors(path)), _described(tensors)
    differing = [
        f"{name} (saved: {saved.get(name)}, expected: {expected.get(name)})"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} does not fit this run: it differs in {abbreviate(differing)}. Use the "
            "configuration it was saved with, or start a new run in another [job] output_dir"
        )
    _read_(path, tensors)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _read_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*single process")
        # No joint planning.
        dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=True)


class _Reader(filesystem.FileSystemReader):
    """Reads tensors with `torch.load(weights_only=True)`, as DCP does."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index: metadata.Metadata = _IndexUnpickler(file).load()
        for piece in index.storage_data.values():
            if not re.fullmatch(TENSOR_FILES, piece.relative_path):
                raise ValueError(f"its index lists {piece.relative_path!r}")
        return index


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of DCP's index and no others, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _READABLE and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises a `CheckpointError` for whatever is wrong with a file: readers raise many kinds."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        if isinstance(cause, pickle.UnpicklingError):
            reason = f"holds more than tensors, which was not loaded; do not trust it ({reason})"
        raise CheckpointError(f"{path}: {reason}") from error
