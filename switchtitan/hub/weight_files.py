"""Find the weights in a folder in Hugging Face's layout: one file, or several and an index."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import file_inside


def find_weight_files(path: Path, single_name: str) -> list[Path]:
    """Returns the files that hold the weights.

    Args:
        path: a weights file, or a folder with `single_name` or its index, `single_name` +
            ".index.json".
        single_name: e.g. "model.safetensors".

    Raises:
        CheckpointError: if there are none, or the index is damaged or names a missing file.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"{path} does not exist; expected a folder with {single_name}, or a weights file"
        )
    index_name = f"{single_name}.index.json"
    try:
        single, index = file_inside(path, single_name), file_inside(path, index_name)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; copy the file itself") from error
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            f"{path} holds neither {single_name} nor {index_name}; use a folder that does"
        )
    files = _read_shard_files(index)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {', '.join(missing)}, which {path} lacks; copy all files of the folder"
        )
    return files


def _read_shard_files(index: Path) -> list[Path]:
    """Returns the index's files, sorted. Refuses paths and links that leave the folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names:
            raise ValueError("no files")
        return [file_inside(index.parent, name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is damaged ({error!r}); expected weight_map: name -> file"
        ) from error


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Opens a safetensors file, whose tensors are memory-mapped.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is a corrupted or truncated safetensors file ({error}); replace it"
        ) from error


def check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    source: Path | str,
    hint: str,
) -> None:
    """Checks names and shapes of what was read from `source`.

    Raises:
        CheckpointError: names the tensors that are missing, unexpected or of another shape, and
            gives the hint.
    """
    wrong = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ],
    }
    problems = [f"{what}: {abbreviate(names)}" for what, names in wrong.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not match the model; {'; '.join(problems)}. {hint}")
