"""Verify that a checkpoint is complete: its sizes, its index, its checksums."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

from switchtitan.checkpoint.layout import (
    METADATA_FILE,
    TENSORS_FILE,
    step_folder_name,
    step_of,
)
from switchtitan.checkpoint.metadata import (
    CheckpointMetadata,
    FileRecord,
    TensorRecord,
    TensorsIndex,
    file_record,
    read_metadata,
    read_tensors_index,
)
from switchtitan.errors import CheckpointError
from switchtitan.files import file_inside
from switchtitan.progress import progress_bar

_NUM_READERS = 4
_MAX_ELEMENTS = 1 << 60
"""torch counts bytes and strides in 64 bits."""
Box = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes, one of each per dimension."""
_MAX_SPLIT_DIMS = 4
"""Dimensions that pieces may divide; FSDP and tensor parallelism divide one or two."""


def check_files(path: Path) -> CheckpointMetadata:
    """Checks the sizes of all files and that the index has every element of a tensor once. Cheap.

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
        try:
            num_bytes = file_inside(path, name).stat().st_size
        except ValueError as error:
            raise CheckpointError(f"{path}: {METADATA_FILE} lists a file, but {error}") from error
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
    num_bytes = sum(record.num_bytes for record in metadata.files.values())
    with (
        progress_bar(f"verifying {path.name}", total=num_bytes, unit="B") as bar,
        ThreadPoolExecutor(_NUM_READERS) as readers,  # hashlib releases the GIL
    ):
        records = readers.map(lambda name: _read_record(path / name, bar.update), metadata.files)
        for (name, expected), found in zip(metadata.files.items(), records, strict=True):
            if found != expected:
                raise CheckpointError(
                    f"{path}: {name} is corrupted: its checksum differs from the saved one"
                )
    return metadata


def _read_record(file: Path, on_bytes: Callable[[int], object]) -> FileRecord:
    try:
        return file_record(file, on_bytes)
    except OSError as error:  # for example a bad sector
        raise CheckpointError(
            f"{file.parent}: cannot read {file.name}: {error.strerror or error}"
        ) from error


def _check_index(path: Path, index: TensorsIndex, metadata: CheckpointMetadata) -> None:
    for name, tensor in index.tensors.items():
        if not _is_covered(tensor):
            raise CheckpointError(
                f"{path}: the pieces of {name} do not cover its shape {list(tensor.shape)} "
                "exactly once"
            )
        for piece in tensor.pieces:
            file = metadata.files.get(piece.file)
            if file is None or piece.start + piece.num_bytes > file.num_bytes:
                raise CheckpointError(
                    f"{path}: a piece of {name} lies outside the files of the checkpoint"
                )
            if piece.num_bytes < math.prod(piece.sizes) * _item_bytes(tensor.dtype):
                raise CheckpointError(
                    f"{path}: a piece of {name} of shape {list(piece.sizes)} has "
                    f"{piece.num_bytes} bytes, which is too short"
                )


def _item_bytes(dtype_name: str) -> int:
    # Loading reports a dtype that this version of torch lacks: it may be intact.
    dtype = getattr(torch, dtype_name, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1


def _is_covered(tensor: TensorRecord) -> bool:
    """Whether every element of a tensor is in exactly one piece."""
    if math.prod(max(1, length) for length in tensor.shape) >= _MAX_ELEMENTS:
        return False  # only a tensor without elements could have such a file
    # DCP finds a piece by its offsets.
    distinct = len({piece.offsets for piece in tensor.pieces}) == len(tensor.pieces)
    return distinct and tiles(
        tensor.shape, [(piece.offsets, piece.sizes) for piece in tensor.pieces]
    )


def tiles(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Returns whether `boxes` are within `shape`, do not overlap and leave no gap.

    Takes time and memory for the boxes' corners, not for elements. The number of boxes that hold an
    element is the sum over all corners at or before it of their signs: + at a start, - at an end,
    multiplied over dimensions. So two sets of boxes hold all elements equally often if and only if
    the signs at each corner add up to the same.
    """
    if not all(_is_inside(shape, box) for box in boxes):
        return False
    if math.prod(shape) == 0:
        return True
    filled = [box for box in boxes if math.prod(box[1]) > 0]
    # The corners in a dimension that no box divides are those of the shape.
    split = [
        dim for dim, length in enumerate(shape) if any(sizes[dim] != length for _, sizes in filled)
    ]
    if len(split) > _MAX_SPLIT_DIMS:
        return False
    pieces = (
        ([offsets[dim] for dim in split], [sizes[dim] for dim in split])
        for offsets, sizes in filled
    )
    lengths = [shape[dim] for dim in split]
    return _corner_signs(pieces) == _corner_signs([([0] * len(split), lengths)])


def _is_inside(shape: Sequence[int], box: Box) -> bool:
    offsets, sizes = box
    return len(offsets) == len(sizes) == len(shape) and all(
        offset >= 0 and size >= 0 and offset + size <= length
        for offset, size, length in zip(offsets, sizes, shape, strict=True)
    )


def _corner_signs(boxes: Iterable[Box]) -> dict[tuple[int, ...], int]:
    """Returns the sum of signs at each corner, without those that cancel."""
    signs: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        ends = [
            ((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)
        ]
        for corner in product(*ends):
            signs[tuple(place for place, _ in corner)] += math.prod(sign for _, sign in corner)
    return {corner: sign for corner, sign in signs.items() if sign}
