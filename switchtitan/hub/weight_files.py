"""Find the weights in a folder in Hugging Face's layout: one file, or several and an index."""

import json
from pathlib import Path

from torch import Tensor

from switchtitan.errors import CheckpointError, abbreviate


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
    if (path / single_name).is_file():
        return [path / single_name]
    index = path / f"{single_name}.index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{path} holds neither {single_name} nor {index.name}; use a folder that does"
        )
    files = [path / name for name in _read_shard_names(index)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {', '.join(missing)}, which {path} lacks; copy all files of the folder"
        )
    return files


def _read_shard_names(index: Path) -> list[str]:
    """Returns the index's files, sorted. Refuses paths, which could leave the folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"expected plain file names, got {names}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is damaged ({error!r}); expected weight_map: name -> file"
        ) from error
    return names


def check_shapes(
    tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]], source: Path | str, hint: str
) -> None:
    """Checks names and shapes.

    Args:
        source: where the tensors were read from, for the message.
        hint: the fix, for the message.

    Raises:
        CheckpointError: names the tensors that are missing, unexpected or of another shape.
    """
    wrong_shapes = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{what}: {abbreviate(names)}"
        for what, names in (
            ("missing", [name for name in expected if name not in tensors]),
            ("unexpected", [name for name in tensors if name not in expected]),
            ("of another shape", wrong_shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{source} does not match the model; {'; '.join(problems)}. {hint}")
