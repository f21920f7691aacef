"""Reads folders that `transformers.AutoModelForCausalLM.from_pretrained` loads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, abbreviate
from switchtitan.files import file_inside
from switchtitan.models import plain_model
from switchtitan.registry import explain

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ReadWeight = Callable[[str], Tensor]
"""Name of a parameter of the plain model -> its value."""
_COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
"""Of rotary frequencies, which old versions of transformers store."""


class _Index(BaseModel):
    """The index of weights that are split over several files."""

    weight_map: dict[str, str]
    """Name of a tensor -> file."""


def read_dense(path: Path, single_name: str = WEIGHTS_NAME) -> dict[str, Tensor]:
    """Memory-maps all tensors, by name, of a safetensors file or a folder in Hugging Face's layout,
    whose only file is `single_name`, or has an index, `single_name` + ".index.json". Raises a
    CheckpointError if a file is missing or damaged."""
    tensors: dict[str, Tensor] = {}
    files = _files_in(path, single_name) if path.is_dir() else [path]
    try:
        for file in files:
            tensors |= load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is a missing, corrupted or truncated safetensors file ({error}); replace it"
        ) from error
    return {name: tensors[name] for name in tensors if not name.endswith(_COMPUTED_SUFFIX)}


def _files_in(folder: Path, single_name: str) -> list[Path]:
    """Returns the files with the weights. Refuses paths and links that leave the folder."""
    index_name = f"{single_name}.index.json"
    try:
        single, index = file_inside(folder, single_name), file_inside(folder, index_name)
        if single.is_file():
            return [single]
        names = set(_Index.model_validate_json(index.read_bytes()).weight_map.values())
        return [file_inside(folder, name) for name in sorted(names)]
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{folder} holds neither {single_name} nor a valid {index_name} "
            f"({explain(error)}); use a folder with the weights"
        ) from error


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Writes a file such as config.json."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_shapes(weights: Mapping[str, Tensor], config: ModelConfig, source: str) -> None:
    """Raises a CheckpointError if names or shapes of weights from `source` are not the model's."""
    expected = parameter_shapes(config)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "unexpected": [name for name in shapes if name not in expected],
        "of another shape": [
            f"{name} {list(shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ],
    }
    problems = [f"{what}: {abbreviate(names)}" for what, names in wrong.items() if names]
    if problems:
        raise CheckpointError(f"{source} does not match [model]; {'; '.join(problems)}")


def read_config(file: Path) -> dict[str, Any]:
    """Reads a config.json; a CheckpointError if it cannot be read, or is no object of JSON."""
    try:
        contents = file_inside(file.parent, file.name).read_bytes()
        return TypeAdapter(dict[str, Any]).validate_json(contents)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is corrupted: {explain(error)}") from error


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of the plain model by name."""
    parameters = plain_model(config).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters}
