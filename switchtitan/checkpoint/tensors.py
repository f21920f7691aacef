"""The tensors of a run's checkpoint: in the run, copied to host memory, and on disk.

torch.distributed.checkpoint (DCP) writes and reads them. What is ours: checksums of what is
written, and readers that run no code of a file.
"""

import hashlib
import io
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import StorageMeta

from switchtitan.checkpoint.find import TENSORS_INDEX_FILE, is_own_file
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.copies import PageLockedMemory
from switchtitan.distributed.norms import non_finite
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.shards import local, with_local
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import named_errors

_MODEL, _OPTIMIZER = "model.", "optimizer."
_ALIGNMENT = 16
"""Bytes at whose multiples copies start; as long as a GPU's widest access."""
_DCP = "torch.distributed.checkpoint"
_READABLE = {
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""(module, name) of all that DCP's index consists of, besides dtypes. Exact: a prefix would let in
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
        return self._of_model | self._of_optimizer(self._optimizer.state_dict())

    def held(self) -> dict[str, Tensor]:
        """Returns all tensors by name, and values outside the state that every rank computes."""
        return self._of_optimizer(self._optimizer.replicated()) | self()

    def restore(self, checkpoint: Path, world: World) -> None:
        """Loads model and optimizer from a checkpoint saved on any number of ranks; collective.

        Raises:
            CheckpointError: on every rank, if it does not fit or cannot be read on any.
        """
        tensors = self()
        world.together(lambda: load_tensors_(checkpoint, tensors))
        own = {name: tensors[name] for name in tensors if name.startswith(_OPTIMIZER)}
        self._optimizer.load_state_dict({name.removeprefix(_OPTIMIZER): own[name] for name in own})

    def check_replicas(self) -> None:
        """Compares the model's replicas across ranks. Collective; synchronizes with the device.

        Raises:
            RanksDisagreeError: on every rank, if replicas differ.
        """
        # The default group of CUDA ranks does not communicate buffers that stay in host memory.
        check_replicas(self._of_model, self._device)

    def check_state(self, numbers: Mapping[str, Tensor]) -> None:
        """Compares all state that several ranks hold: model, optimizer, and `numbers`.

        Shards are compared over replicas. Plain tensors, such as counts and random bases, are
        compared over all ranks. Collective; synchronizes with the device.

        Args:
            numbers: further plain tensors by name, on any device.

        Raises:
            RanksDisagreeError: on every rank, if ranks differ.
        """
        # The state of some optimizers takes time to collect.
        if dist.is_initialized() and dist.get_world_size() > 1:
            check_replicas(self.held() | dict(numbers), self._device)

    def non_finite(self) -> list[str]:
        """Returns the names of the model's tensors with an inf or nan, the same on every rank.

        Collective; synchronizes with the device.
        """
        return non_finite(self._of_model, self._device)

    @staticmethod
    def _of_optimizer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{_OPTIMIZER}{name}": tensor for name, tensor in tensors.items()}


class HostMemory:
    """Host memory for copies of a run's tensors, page-locked on CUDA; each save reuses it.

    Copying into memory that is already allocated takes a quarter of the time, and a device writes
    page-locked memory directly, in one queue without waiting for each tensor.
    """

    def __init__(self) -> None:
        self._page_locked: PageLockedMemory | None = None
        self._copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns copies by name, complete and valid until the next call; local shards of DTensors.

        All copies share a storage, which has no other bytes than theirs, but for the alignment.
        """
        shards = {name: local(tensor) for name, tensor in tensors.items()}
        if _shapes(shards) != _shapes(self._copies):
            self._copies.clear()  # the old and the new memory together may not fit
            self._copies = self._allocate(shards)
        # The host must not write to memory that the device is writing to.
        for name in sorted(shards, key=lambda name: shards[name].is_cuda):
            self._copies[name].copy_(shards[name], non_blocking=True)
        if any(shard.is_cuda for shard in shards.values()):
            torch.cuda.current_stream().synchronize()
        return {name: with_local(tensors[name], copy) for name, copy in self._copies.items()}

    def _allocate(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._page_locked = None
        starts, num_bytes = dict[str, int](), 0
        for name, shard in shards.items():
            starts[name] = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
            num_bytes = starts[name] + shard.nbytes
        if any(shard.is_cuda for shard in shards.values()):
            self._page_locked = PageLockedMemory(num_bytes)
            memory = self._page_locked.bytes
        else:
            memory = torch.empty(num_bytes, dtype=torch.uint8)
        return {
            name: memory[start : start + shards[name].nbytes]
            .view(shards[name].dtype)
            .view(shards[name].shape)
            for name, start in starts.items()
        }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup
) -> dict[str, str]:
    """Writes tensors to `folder`, flushed to disk; collective over `group`.

    Returns the checksums of this rank's files by name. What several ranks hold is written once.
    """
    writer = _Writer(folder)
    dcp.save(dict(tensors), storage_writer=writer, process_group=group)
    return writer.sums


class _Writer(FileSystemWriter):
    """Writes one file per rank, and the index on the coordinator, all flushed and hashed."""

    def __init__(self, folder: Path) -> None:
        # No copy-ahead: a background save holds host memory. On CUDA, copy-ahead would still wait
        # for the stream of device 0, on which training runs, or create a CUDA context there on
        # every rank. No `sync_files`: it flushes `.metadata` before its last bytes are written.
        super().__init__(
            folder,
            single_file_per_rank=True,
            sync_files=False,
            overwrite=False,
            per_thread_copy_ahead=0,
        )
        self.sums: dict[str, str] = {}
        self.fs = _HashedFiles(self.sums)

    def storage_meta(self) -> StorageMeta:
        # DCP's version contains the folder, which is renamed later.
        return StorageMeta(save_id=self.save_id)


class _HashedFiles(FileSystem):
    def __init__(self, sums: dict[str, str]) -> None:
        self._sums = sums

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with named_errors(Path(path)):
            file = _HashedFile(path, mode)
            try:
                with io.BufferedWriter(file) as stream:
                    yield stream
            except RuntimeError as error:  # torch.save hides an OSError behind it
                raise file.error or error from error
        self._sums[Path(path).name] = file.digest.hexdigest()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self._sums[Path(new_path).name] = self._sums.pop(Path(path).name)


class _HashedFile(io.FileIO):
    """A file flushed to disk, and the checksum of what was written, whatever a disk makes of it."""

    def __init__(self, path: str | os.PathLike, mode: str) -> None:
        super().__init__(path, mode)
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        """Why a write failed."""

    def write(self, data: Any) -> int:
        try:
            num_bytes = super().write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(memoryview(data)[:num_bytes])
        return num_bytes

    def close(self) -> None:
        try:
            if not self.closed:
                os.fsync(self.fileno())
        finally:
            super().close()


class SavedTensors:
    """The tensors of a checkpoint whose names start with a prefix, read on request.

    The prefix is removed from the names. Needs no process group.

    Args:
        path: a verified checkpoint, as `find_given` returns it.

    Raises:
        CheckpointError: if the checkpoint has no such tensor.
    """

    def __init__(self, path: Path, prefix: str = "") -> None:
        self._path, self._prefix = path, prefix
        self.on_meta: dict[str, Tensor] = {
            name.removeprefix(prefix): tensor
            for name, tensor in _saved_tensors(path).items()
            if name.startswith(prefix)
        }
        """All names, with shapes and dtypes."""
        if not self.on_meta:
            raise CheckpointError(f"{path}: holds no tensor whose name starts with {prefix!r}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns full tensors on the CPU.

        Raises:
            CheckpointError: if a tensor cannot be read.
        """
        with _reading(self._path):
            tensors = {name: torch.empty_like(self.on_meta[name], device="cpu") for name in names}
        _read_(self._path, {f"{self._prefix}{name}": tensor for name, tensor in tensors.items()})
        return tensors


def load_tensors_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills `tensors` in place from the checkpoint at `path`, which may be sharded differently.

    Each rank reads the pieces that it needs; not collective.

    Args:
        path: a verified checkpoint.
        tensors: the saved names, shapes and dtypes, all of them; DTensors or plain tensors, not on
            meta.

    Raises:
        CheckpointError: before any tensor changes, if names, shapes or dtypes differ; or if a
            tensor cannot be read.
    """
    saved = _saved_tensors(path)
    differing = [
        f"{name} (saved: {_described(saved.get(name))}, expected: {_described(tensors.get(name))})"
        for name in sorted({*saved, *tensors})
        if _described(saved.get(name)) != _described(tensors.get(name))
    ]
    if differing:
        raise CheckpointError(
            f"{path} does not fit this run: it differs in {abbreviate(differing)}. Use the "
            "configuration it was saved with, or start a new run in another [job] output_dir"
        )
    _read_(path, tensors)


def _described(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _saved_tensors(path: Path) -> dict[str, Tensor]:
    """Returns all tensors of a checkpoint on the meta device, by name."""
    with _reading(path):
        saved: dict[str, Any] = _Reader(path).read_metadata().state_dict_metadata
        return {
            name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for name, entry in saved.items()
        }


def _read_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with _reading(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*single process")
        # No joint planning.
        dcp.load(dict(tensors), storage_reader=_Reader(path), no_dist=True)


class _Reader(FileSystemReader):
    """Reads DCP's index with `_IndexUnpickler`, and tensors with `torch.load(weights_only=True)`,
    as DCP does."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / TENSORS_INDEX_FILE).open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        for piece in metadata.storage_data.values():
            if not is_own_file(piece.relative_path):
                raise CheckpointError(f"its index lists {piece.relative_path!r}")
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of DCP's index and no others, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _READABLE and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises a `CheckpointError` for whatever is wrong with a file: readers raise many kinds."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        cause = next(iter(_causes(error).values()))
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        if isinstance(cause, pickle.UnpicklingError):
            reason = f"holds more than tensors, which was not loaded; do not trust it ({reason})"
        raise CheckpointError(f"{path}: {reason}") from error


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Raises a `CheckpointError` for what a user can fix, such as a full disk, on any rank."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        causes = _causes(error)
        if not all(isinstance(cause, OSError | CheckpointError) for cause in causes.values()):
            raise RuntimeError(str(error)) from error
        reasons = (f"on rank {rank}: {cause}" for rank, cause in causes.items())
        raise CheckpointError("; ".join(reasons)) from error


def _causes(error: BaseException) -> dict[int, BaseException]:
    """Returns what went wrong, by rank. DCP's exception hides it."""
    if isinstance(error, CheckpointException):
        return {rank: cause for rank, (cause, _) in error.failures.items()}
    return {dist.get_rank() if dist.is_initialized() else 0: error}
