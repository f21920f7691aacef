"""A checkpoint's folder: its files, their contents, and whether they are complete.

    <output_dir>/checkpoints/step-000001000/
        metadata.json           format, step, run, versions; size and checksum of the files below
        metadata.json.sha256    the checksum of metadata.json, as `sha256sum` writes it
        tensors.json            every tensor: dtype, shape, and the location of its pieces
        __<rank>_0.distcp       the pieces written by a rank (torch.distributed.checkpoint)
        .metadata               tensors.json for torch's tools; a pickle, so never read here

The folder is named `.step-000001000.partial` until it is complete.
"""

import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import sha256_of_file

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of checkpoints in a run's output folder."""
METADATA_FILE = "metadata.json"
METADATA_CHECKSUM_FILE = f"{METADATA_FILE}.sha256"
TENSORS_FILE = "tensors.json"
DCP_METADATA_FILE = ".metadata"

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_OWN_FILE = re.compile(
    rf"__\d+_\d+\.distcp|{re.escape(DCP_METADATA_FILE)}(\.tmp)?|{TENSORS_FILE}|{METADATA_FILE}(\.sha256)?"
)


def step_folder_name(step: int) -> str:
    return f"step-{step:09d}"


def partial_folder_name(step: int) -> str:
    return f".{step_folder_name(step)}.partial"


def deleted_folder(path: Path) -> Path:
    """The name of a checkpoint's folder during deletion."""
    return path.with_name(f".{path.name}.deleting")


def list_deleted_folders(folder: Path) -> list[Path]:
    """The folders in `folder` whose deletion was interrupted."""
    return sorted(folder.glob(".step-*.deleting"))


def step_of(path: Path) -> int | None:
    """The step in the name of a finished checkpoint's folder; None if `path` is not named like
    one."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    finished = [path for path in folder.iterdir() if step_of(path) is not None and path.is_dir()]
    return sorted(finished, key=lambda path: step_of(path) or 0, reverse=True)


def foreign_files(folder: Path) -> list[str]:
    """Names in a checkpoint's folder that `Checkpointer` does not write."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if not _OWN_FILE.fullmatch(path.name) or not path.is_file()
    )


def remove_folder(folder: Path) -> None:
    """Deletes a folder that holds nothing but a checkpoint's own files.

    Raises:
        OSError: if it holds other files, which are not deleted.
    """
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.is_file():
            path.unlink()
    folder.rmdir()


def sync_folder(folder: Path) -> None:
    """Flushes the names in `folder` to disk; a file's fsync does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


FORMAT_VERSION = 3
"""3 has `metadata.json.sha256`. In 1, B of low-rank layers, its candidates and its moments were
transposed, [out, rank]."""
_FIRST_WITH_CHECKSUM = 3
_TRANSPOSED_IN_FORMAT_1 = ".lora_b"
"""In the names of tensors that format 1 transposes. A checkpoint of format 1 without such a tensor
is read like one of format 2."""
_READERS = {1: "0.1"}
"""The version of switchtitan that reads a former format."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file of the checkpoint next to `metadata.json`."""

    num_bytes: int = Field(ge=0)
    sha256: str


class CheckpointMetadata(_Record):
    """The contents of `metadata.json`."""

    format_version: int
    step: int = Field(ge=0)
    """Optimizer steps done."""
    train_state: dict[str, JsonValue]
    """The trainer's state, e.g. the number of tokens seen."""
    identity: dict[str, JsonValue]
    """The values that may not change on resume: model, method, corpus."""
    run: dict[str, JsonValue]
    """For the reader: the configuration, the corpus, the time."""
    versions: dict[str, str]
    """Versions of the code that wrote it."""
    files: dict[str, FileRecord]
    """Every other file in the folder, by name."""


class Piece(_Record):
    """A rectangular part of a tensor and the location of its bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int = Field(ge=0)
    num_bytes: int = Field(ge=0)


class TensorRecord(_Record):
    """A tensor of the checkpoint."""

    dtype: str
    """As in `torch.<dtype>`."""
    shape: tuple[int, ...]
    pieces: list[Piece]


class TensorsIndex(_Record):
    """The contents of `tensors.json`."""

    tensors: dict[str, TensorRecord]


_File = TypeVar("_File", CheckpointMetadata, TensorsIndex)


def read_metadata(path: Path) -> CheckpointMetadata:
    """Reads `metadata.json` of the checkpoint at `path`, without checking the other files.

    Raises:
        CheckpointFormatError: if this version does not read the checkpoint's format.
        CheckpointError: if it is missing or damaged.
    """
    is_covered = _check_metadata_checksum(path)
    metadata = _read(path / METADATA_FILE, CheckpointMetadata)
    if not _is_readable(path, metadata.format_version):
        own = metadata.versions.get("switchtitan", "of the version that wrote it")
        raise CheckpointFormatError(
            f"{path}: the checkpoint has format {metadata.format_version}, but this version of "
            f"switchtitan reads format {FORMAT_VERSION}; resume, evaluate or export it with "
            f"switchtitan {_READERS.get(metadata.format_version, own)}, or start a new run in "
            "another [job] output_dir"
        )
    if metadata.format_version >= _FIRST_WITH_CHECKSUM and not is_covered:
        raise CheckpointError(f"{path}: {METADATA_CHECKSUM_FILE} is missing")
    return metadata


def _check_metadata_checksum(path: Path) -> bool:
    """Compares `metadata.json` with its checksum; returns whether it has one.

    Raises:
        CheckpointError: if they differ or cannot be read.
    """
    try:
        saved = (path / METADATA_CHECKSUM_FILE).read_bytes()
        contents = (path / METADATA_FILE).read_bytes()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot read {METADATA_FILE}: {error.strerror or error}"
        ) from error
    if saved != _checksum_line(contents):
        raise CheckpointError(
            f"{path}: {METADATA_FILE} or its checksum in {METADATA_CHECKSUM_FILE} is corrupted"
        )
    return True


def _checksum_line(contents: bytes) -> bytes:
    return f"{hashlib.sha256(contents).hexdigest()}  {METADATA_FILE}\n".encode()


def _is_readable(path: Path, format_version: int) -> bool:
    if format_version == 1:
        return not any(_TRANSPOSED_IN_FORMAT_1 in name for name in read_tensors_index(path).tensors)
    return format_version in (2, FORMAT_VERSION)


def read_tensors_index(path: Path) -> TensorsIndex:
    """Reads `tensors.json` of the checkpoint at `path`.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    return _read(path / TENSORS_FILE, TensorsIndex)


def write_metadata(path: Path, metadata: CheckpointMetadata) -> None:
    """Writes `metadata.json` and its checksum to the checkpoint at `path`, flushed to disk."""
    contents = metadata.model_dump_json(indent=2).encode()
    _write_new(path / METADATA_FILE, contents)
    _write_new(path / METADATA_CHECKSUM_FILE, _checksum_line(contents))


def write_tensors_index(path: Path, index: TensorsIndex) -> FileRecord:
    """Writes `tensors.json` to the checkpoint at `path`, flushed to disk; returns size and
    checksum."""
    data = index.model_dump_json().encode()
    _write_new(path / TENSORS_FILE, data)
    return FileRecord(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write_new(file: Path, contents: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(contents)
        stream.flush()
        os.fsync(stream.fileno())


def file_record(path: Path) -> FileRecord:
    """Returns the size and the checksum of the file `path`."""
    return FileRecord(num_bytes=path.stat().st_size, sha256=sha256_of_file(path))


def _read(path: Path, kind: type[_File]) -> _File:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path.parent}: cannot read {path.name}: {error.strerror or error}"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = " at " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        raise CheckpointError(
            f"{path.parent}: {path.name} is damaged{where}: {first['msg']}"
        ) from error


_NUM_READERS = 4


def check_files(path: Path) -> CheckpointMetadata:
    """Checks the sizes of all files and that the index covers every tensor. Cheap.

    Raises:
        CheckpointError: names the first problem.
    """
    metadata = read_metadata(path)
    if step_of(path) not in (None, metadata.step):
        raise CheckpointError(
            f"{path}: {METADATA_FILE} is of step {metadata.step}; if the folder was renamed, "
            f"rename it to {step_folder_name(metadata.step)}"
        )
    for name, expected in metadata.files.items():
        if Path(name).name != name:
            raise CheckpointError(
                f"{path}: metadata.json lists {name!r}, which is not a plain file name"
            )
        try:
            num_bytes = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {name} is missing") from error
        if num_bytes != expected.num_bytes:
            raise CheckpointError(
                f"{path}: {name} has {num_bytes} bytes, expected {expected.num_bytes}"
            )
    if TENSORS_FILE not in metadata.files:
        raise CheckpointError(f"{path}: metadata.json does not list {TENSORS_FILE}")
    _check_index(path, read_tensors_index(path), metadata)
    return metadata


def check_contents(path: Path) -> CheckpointMetadata:
    """Checks as `check_files`, and verifies all checksums, which reads the full checkpoint once.

    Raises:
        CheckpointError: names the first problem.
    """
    metadata = check_files(path)
    with ThreadPoolExecutor(_NUM_READERS) as readers:  # hashlib releases the GIL
        records = readers.map(lambda name: file_record(path / name), metadata.files)
        for (name, expected), found in zip(metadata.files.items(), records, strict=True):
            if found != expected:
                raise CheckpointError(
                    f"{path}: {name} is corrupted: its checksum differs from the saved one"
                )
    return metadata


def _check_index(path: Path, index: TensorsIndex, metadata: CheckpointMetadata) -> None:
    for name, tensor in index.tensors.items():
        if not _is_covered(tensor):
            raise CheckpointError(
                f"{path}: the pieces of {name} do not cover its shape {list(tensor.shape)}"
            )
        for piece in tensor.pieces:
            file = metadata.files.get(piece.file)
            if file is None or piece.start + piece.num_bytes > file.num_bytes:
                raise CheckpointError(
                    f"{path}: a piece of {name} lies outside the files of the checkpoint"
                )


def _is_covered(tensor: TensorRecord) -> bool:
    """Whether a tensor's pieces cover its shape.

    Pieces do not overlap (DCP checks this when it plans a save), so comparing numbers of elements
    suffices."""
    inside = all(
        len(piece.offsets) == len(piece.sizes) == len(tensor.shape)
        and all(
            offset >= 0 and size >= 0 and offset + size <= length
            for offset, size, length in zip(piece.offsets, piece.sizes, tensor.shape, strict=True)
        )
        for piece in tensor.pieces
    )
    distinct = len({piece.offsets for piece in tensor.pieces}) == len(tensor.pieces)
    num_elements = sum(math.prod(piece.sizes) for piece in tensor.pieces)
    return inside and distinct and num_elements == math.prod(tensor.shape)
