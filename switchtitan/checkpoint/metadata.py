"""What a checkpoint says about itself, in two JSON files that are validated when read."""

import hashlib
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from switchtitan.checkpoint.layout import METADATA_FILE, TENSORS_FILE
from switchtitan.errors import CheckpointError
from switchtitan.files import sha256_of_file

FORMAT_VERSION = 2
"""2: B of low-rank layers, its candidates and its moments are stored vectors first, [rank, out]; 1 had them transposed."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Record):
    """A file of the checkpoint beside `metadata.json`."""

    num_bytes: int = Field(ge=0)
    sha256: str


class CheckpointMetadata(_Record):
    """The contents of `metadata.json`."""

    format_version: int
    step: int = Field(ge=0)
    """Optimizer steps done."""
    train_state: dict[str, JsonValue]
    """What the trainer goes on from, e.g. the number of tokens seen."""
    identity: dict[str, JsonValue]
    """What may not change when a run is resumed: model, method, corpus."""
    run: dict[str, JsonValue]
    """For the reader: the configuration, the corpus, the time."""
    versions: dict[str, str]
    """Of the code that wrote it."""
    files: dict[str, FileRecord]
    """Every other file in the folder, by name."""


class Piece(_Record):
    """A rectangular part of a tensor and where its bytes lie."""

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
    """Reads `metadata.json` of the checkpoint at `path`; does not look at the other files.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format version.
    """
    metadata = _read(path / METADATA_FILE, CheckpointMetadata)
    if metadata.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint format {metadata.format_version}, but this version of switchtitan reads format "
            f"{FORMAT_VERSION}; resume or export it with switchtitan {metadata.versions.get('switchtitan', 'unknown')}, "
            "which wrote it, or start a new run in another [job] output_dir"
        )
    return metadata


def read_tensors_index(path: Path) -> TensorsIndex:
    """Reads `tensors.json` of the checkpoint at `path`.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    return _read(path / TENSORS_FILE, TensorsIndex)


def write_json(path: Path, contents: CheckpointMetadata | TensorsIndex) -> FileRecord:
    """Writes `contents` durably to the new file `path` and returns its size and checksum."""
    indent = 2 if isinstance(contents, CheckpointMetadata) else None
    data = contents.model_dump_json(indent=indent).encode()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def file_record(path: Path) -> FileRecord:
    """Reads the file `path` for its size and checksum."""
    return FileRecord(num_bytes=path.stat().st_size, sha256=sha256_of_file(path))


def _read(path: Path, kind: type[_File]) -> _File:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot read {path.name}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"{path.parent}: {path.name} is damaged{f' at {where}' if where else ''}: {first['msg']}"
        ) from error
