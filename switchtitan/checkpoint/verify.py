"""Whether a checkpoint is whole."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from switchtitan.checkpoint.layout import TENSORS_FILE
from switchtitan.checkpoint.metadata import (
    CheckpointMetadata,
    TensorRecord,
    TensorsIndex,
    file_record,
    read_metadata,
    read_tensors_index,
)
from switchtitan.errors import CheckpointError

_NUM_READERS = 4


def check_files(path: Path) -> CheckpointMetadata:
    """Checks that every file is there in full length and that the index covers every tensor. Cheap.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    metadata = read_metadata(path)
    for name, expected in metadata.files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path}: metadata.json lists {name!r}, which is not a plain file name")
        try:
            num_bytes = (path / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: {name} is missing") from error
        if num_bytes != expected.num_bytes:
            raise CheckpointError(f"{path}: {name} has {num_bytes} bytes, expected {expected.num_bytes}")
    if TENSORS_FILE not in metadata.files:
        raise CheckpointError(f"{path}: metadata.json does not list {TENSORS_FILE}")
    _check_index(path, read_tensors_index(path), metadata)
    return metadata


def check_contents(path: Path) -> CheckpointMetadata:
    """As `check_files`, and compares every file's checksum, for which it reads the whole checkpoint once.

    Raises:
        CheckpointError: names the first thing that is wrong.
    """
    metadata = check_files(path)
    with ThreadPoolExecutor(_NUM_READERS) as readers:  # hashlib lets other threads run
        records = readers.map(lambda name: file_record(path / name), metadata.files)
        for (name, expected), found in zip(metadata.files.items(), records, strict=True):
            if found != expected:
                raise CheckpointError(
                    f"{path}: {name} is damaged: its checksum is not the one it was saved with"
                )
    return metadata


def _check_index(path: Path, index: TensorsIndex, metadata: CheckpointMetadata) -> None:
    for name, tensor in index.tensors.items():
        if not _is_covered(tensor):
            raise CheckpointError(f"{path}: the pieces of {name} do not cover its shape {list(tensor.shape)}")
        for piece in tensor.pieces:
            file = metadata.files.get(piece.file)
            if file is None or piece.start + piece.num_bytes > file.num_bytes:
                raise CheckpointError(f"{path}: a piece of {name} lies outside the files of the checkpoint")


def _is_covered(tensor: TensorRecord) -> bool:
    """Pieces never overlap (DCP checks that when it plans a save), so those inside the shape cover it if they
    are as many."""
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
