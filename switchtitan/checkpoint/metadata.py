"""`metadata.json` and `tensors.json` of a checkpoint: their contents, reading and writing."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from switchtitan.checkpoint.layout import METADATA_CHECKSUM_FILE, METADATA_FILE, TENSORS_FILE
from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import (
    checksum_line,
    file_inside,
    named_errors,
    sha256_of_file,
    sync_file,
)

FORMAT_VERSION = 4
"""Earlier ones have other keys of the configuration and of the training state, and SwitchLoRA's
switches in other tensors."""


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

    @property
    def config(self) -> str:
        """The configuration of the run that saved the checkpoint, as TOML.

        Raises:
            CheckpointError: if the checkpoint does not state it.
        """
        config = self.run.get("config")
        if not isinstance(config, str):
            raise CheckpointError(f"{METADATA_FILE} of step {self.step}: run.config is missing")
        return config

    def identity_value(self, section: str, key: str) -> JsonValue:
        """Returns one value of the identity.

        Raises:
            CheckpointError: if the checkpoint does not state it.
        """
        values = self.identity.get(section)
        if not isinstance(values, dict) or key not in values:
            raise CheckpointError(
                f"{METADATA_FILE} of step {self.step}: identity.{section}.{key} is missing"
            )
        return values[key]

    def identity_number(self, section: str, key: str) -> int:
        """Returns one value of the identity, an integer of 0 or more.

        Raises:
            CheckpointError: if the checkpoint does not state it, or states another value.
        """
        number = self.identity_value(section, key)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 1 << 63:
            raise CheckpointError(
                f"{METADATA_FILE} of step {self.step}: identity.{section}.{key} = {number!r}: "
                "expected an integer >= 0"
            )
        return number


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
    if metadata.format_version != FORMAT_VERSION:
        own = metadata.versions.get("switchtitan", "of the version that wrote it")
        raise CheckpointFormatError(
            f"{path}: the checkpoint has format {metadata.format_version}, but this version of "
            f"switchtitan reads format {FORMAT_VERSION}; resume, evaluate or export it with "
            f"switchtitan {own}, or start a new run in another [job] output_dir"
        )
    if not is_covered:
        raise CheckpointError(f"{path}: {METADATA_CHECKSUM_FILE} is missing")
    return metadata


def _check_metadata_checksum(path: Path) -> bool:
    """Compares `metadata.json` with its checksum; returns whether it has one.

    Raises:
        CheckpointError: if they differ or cannot be read.
    """
    with _reading(path / METADATA_FILE):
        try:
            saved = file_inside(path, METADATA_CHECKSUM_FILE).read_bytes()
            contents = file_inside(path, METADATA_FILE).read_bytes()
        except FileNotFoundError:
            return False
    if saved != checksum_line(contents, METADATA_FILE):
        raise CheckpointError(
            f"{path}: {METADATA_FILE} or its checksum in {METADATA_CHECKSUM_FILE} is corrupted"
        )
    return True


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
    _write_new(path / METADATA_CHECKSUM_FILE, checksum_line(contents, METADATA_FILE))


def write_tensors_index(path: Path, index: TensorsIndex) -> FileRecord:
    """Writes `tensors.json` to the checkpoint at `path`, flushed to disk; returns size and
    checksum."""
    data = index.model_dump_json().encode()
    _write_new(path / TENSORS_FILE, data)
    return FileRecord(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _write_new(file: Path, contents: bytes) -> None:
    with named_errors(file), file.open("xb") as stream:
        stream.write(contents)
        stream.flush()
        sync_file(stream.fileno())


def file_record(path: Path, on_bytes: Callable[[int], object] | None = None) -> FileRecord:
    """Returns the size and the checksum of the file `path`; see `sha256_of_file`."""
    return FileRecord(num_bytes=path.stat().st_size, sha256=sha256_of_file(path, on_bytes))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raises a `CheckpointError` if the checkpoint's file cannot be read."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{file.parent}: {error}; copy the file itself") from error
    except OSError as error:
        raise CheckpointError(
            f"{file.parent}: cannot read {file.name}: {error.strerror or error}"
        ) from error


def _read(path: Path, kind: type[_File]) -> _File:
    with _reading(path):
        contents = file_inside(path.parent, path.name).read_bytes()
    try:
        return kind.model_validate_json(contents)
    except ValidationError as error:
        first = error.errors()[0]
        where = " at " + ".".join(map(str, first["loc"])) if first["loc"] else ""
        raise CheckpointError(
            f"{path.parent}: {path.name} is damaged{where}: {first['msg']}"
        ) from error
