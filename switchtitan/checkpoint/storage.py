"""DCP's file reader and writer with checksums, and with an index in JSON instead of a pickle."""

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    FileSystemReader,
    FileSystemWriter,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import WriteResult

from switchtitan.checkpoint.layout import TENSORS_FILE
from switchtitan.checkpoint.metadata import (
    FileRecord,
    Piece,
    TensorRecord,
    TensorsIndex,
    write_tensors_index,
)
from switchtitan.errors import CheckpointError
from switchtitan.files import named_errors, sync_file
from switchtitan.progress import progress_bar


class ChecksummingWriter(FileSystemWriter):
    """Writes one file per rank, and the indices on the coordinator, all flushed to disk.

    `written` holds this rank's files by name, with size and checksum of the data passed to `write`.
    """

    def __init__(self, folder: Path) -> None:
        # No copy-ahead: a background save holds host memory. On CUDA, copy-ahead would still wait
        # for the stream of device 0, on which training runs, or create a CUDA context there on
        # every rank.
        super().__init__(
            folder,
            single_file_per_rank=True,
            # Our streams flush to disk. DCP flushes `.metadata` before its last bytes are written.
            sync_files=False,
            overwrite=False,
            per_thread_copy_ahead=0,
        )
        self.written: dict[str, FileRecord] = {}
        self.fs = _ChecksummingFiles(self.written)

    def storage_meta(self) -> StorageMeta:
        # DCP's version contains the folder, which is renamed later.
        return StorageMeta(save_id=self.save_id)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.written[TENSORS_FILE] = write_tensors_index(Path(self.path), _index_from_dcp(metadata))


class JsonIndexReader(FileSystemReader):
    """Reads the index from `tensors.json`, and tensors with `torch.load(weights_only=True)`.

    A piece must hold what the index says, and take no more memory than its bytes in the file.

    Args:
        index: the contents of `tensors.json`.
    """

    def __init__(self, folder: Path, index: TensorsIndex) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        index = self._index
        self._records = {
            MetadataIndex(name, torch.Size(piece.offsets)): (tensor.dtype, piece.sizes)
            for name, tensor in index.tensors.items()
            for piece in tensor.pieces
        }
        return _index_to_dcp(index)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        name = f"loading {Path(self.path).name}"
        for item in progress_bar(name, plan.items, total=len(plan.items), unit="tensors"):
            piece = self._read_piece(item.storage_index)
            part = narrow_tensor_by_index(piece, item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _read_piece(self, piece: MetadataIndex) -> Tensor:
        where: _StorageInfo = self.storage_data[piece]
        with (Path(self.path) / where.relative_path).open("rb") as file:
            stream = io.BufferedReader(_Slice(file, where.offset, where.length))
            try:
                _check_uncompressed(stream, where.length)
                tensor = torch.load(stream, map_location="cpu", weights_only=True)
            except OSError:
                raise
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{self.path} holds objects other than tensors, which were not loaded; do not "
                    "trust it"
                ) from error
            except Exception as error:  # torch.load raises many kinds for a damaged file
                raise CheckpointError(
                    f"{self.path}: {piece.fqn} cannot be read ({type(error).__name__}: {error})"
                ) from error
        dtype, sizes = self._records[piece]
        if (
            not isinstance(tensor, Tensor)
            or (tensor.layout, tensor.device.type) != (torch.strided, "cpu")
            or (tensor.dtype, tuple(tensor.shape)) != (dtype_named(dtype), sizes)
        ):
            raise CheckpointError(f"{self.path}: {piece.fqn} is not what {TENSORS_FILE} says")
        return tensor


class _Slice(io.RawIOBase):
    """A part of a file. torch's own view does not seek back from its end, as zipfile does."""

    def __init__(self, file: io.BufferedReader, start: int, num_bytes: int) -> None:
        self._file = file
        self._start = start
        self._num_bytes = num_bytes
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._num_bytes}[whence]
        if origin + offset < 0:
            raise ValueError(f"seek to {origin + offset}, before the start")
        self._place = origin + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        num_bytes = max(0, min(len(buffer), self._num_bytes - self._place))
        self._file.seek(self._start + self._place)
        num_read = self._file.readinto(memoryview(buffer)[:num_bytes])
        self._place += num_read
        return num_read


def _check_uncompressed(stream: IO[bytes], num_bytes: int) -> None:
    """Checks that a zip archive takes no more memory than its own size.

    Raises:
        ValueError: if it does.
        zipfile.BadZipFile: if it is not a zip archive.
    """
    with zipfile.ZipFile(stream) as archive:
        entries = archive.infolist()
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        or sum(entry.file_size for entry in entries) > num_bytes
    ):
        raise ValueError("the archive is compressed or its entries overlap")
    stream.seek(0)


class _ChecksummingFiles(FileSystem):
    def __init__(self, written: dict[str, FileRecord]) -> None:
        self._written = written

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        with named_errors(Path(path)), super().create_stream(path, mode) as file:
            stream = _ChecksummingStream(file)  # type: ignore[arg-type]
            try:
                yield stream  # type: ignore[misc]
                stream.close()
            except Exception as error:
                # torch.save hides it behind an error of its own.
                if stream.error is not None and error is not stream.error:
                    raise stream.error from error
                raise
            self._written[Path(path).name] = stream.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self._written[Path(new_path).name] = self._written.pop(Path(path).name)


class _ChecksummingStream:
    """A write-only stream with a running checksum; DCP only appends. Closing it flushes to disk."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0
        self.error: OSError | None = None
        """Why a write failed."""

    def write(self, data: bytes | memoryview) -> int:
        self._digest.update(data)
        try:
            num_bytes = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._num_bytes += num_bytes
        return num_bytes

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        if not self._file.closed:
            self.flush()
            sync_file(self._file.fileno())
            self._file.close()

    def record(self) -> FileRecord:
        return FileRecord(num_bytes=self._num_bytes, sha256=self._digest.hexdigest())


def _index_from_dcp(metadata: Metadata) -> TensorsIndex:
    tensors = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), f"{name} is not a tensor"
        pieces = []
        for chunk in tensor.chunks:
            info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            pieces.append(
                Piece(
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    file=info.relative_path,
                    start=info.offset,
                    num_bytes=info.length,
                )
            )
        dtype = str(tensor.properties.dtype).removeprefix("torch.")
        tensors[name] = TensorRecord(dtype=dtype, shape=tuple(tensor.size), pieces=pieces)
    return TensorsIndex(tensors=tensors)


def _index_to_dcp(index: TensorsIndex) -> Metadata:
    tensors: dict = {}
    storage = {}
    for name, tensor in index.tensors.items():
        chunks = []
        for piece in tensor.pieces:
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            storage[MetadataIndex(name, chunk.offsets)] = _StorageInfo(
                piece.file, piece.start, piece.num_bytes
            )
            chunks.append(chunk)
        properties = TensorProperties(dtype=dtype_named(tensor.dtype))
        tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    return Metadata(state_dict_metadata=tensors, storage_data=storage)


def dtype_named(name: str) -> torch.dtype:
    """Returns `torch.<name>`.

    Raises:
        CheckpointError: if torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"the checkpoint holds a tensor of dtype {name!r}, which this version of torch lacks"
        )
    return dtype
