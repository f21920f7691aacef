"""Read folders that `transformers.AutoModelForCausalLM.from_pretrained` loads.

Reading changes neither names nor values.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError
from switchtitan.files import file_inside
from switchtitan.hub.weight_files import find_weight_files, open_weights
from switchtitan.models import MODELS

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
_COMPUTED_SUFFIX = ".rotary_emb.inv_freq"
"""End of the names of tensors that old versions of transformers store, though they follow from
config.json."""


def read_dense(path: Path) -> dict[str, Tensor]:
    """Memory-maps all weights, by name, of a safetensors file or a folder in Hugging Face's layout.

    Rotary frequencies, which old versions of transformers store, are left out.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in find_weight_files(path, WEIGHTS_NAME):
        with open_weights(file) as opened:
            names = [name for name in opened.keys() if not name.endswith(_COMPUTED_SUFFIX)]  # noqa: SIM118
            tensors.update({name: opened.get_tensor(name) for name in names})
    return tensors


def without_copies(
    tensors: dict[str, Tensor], config: ModelConfig, path: Path
) -> dict[str, Tensor]:
    """Returns the weights without those that repeat another, such as a tied head's.

    Raises:
        CheckpointError: if a copy differs from the weight that it repeats.
    """
    kept = dict(tensors)
    for copy, name in config.weight_copies().items():
        repeated = kept.pop(copy, None)
        if repeated is None:
            continue
        weight = kept.setdefault(name, repeated)
        is_equal = (weight.dtype, weight.shape) == (repeated.dtype, repeated.shape)
        if not is_equal or not torch.equal(weight, repeated):
            raise CheckpointError(
                f"{path}: {copy} and {name} differ, but the model's head is tied "
                "(tie_word_embeddings in config.json); remove one of them, or untie the head"
            )
    return kept


def check_config(config: ModelConfig, path: Path) -> None:
    """Checks a model against the config.json next to its weights, if there is one.

    Raises:
        CheckpointError: names the keys that differ.
    """
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    if file.is_file() and (differing := config.check_huggingface_config(read_config(file))):
        raise CheckpointError(
            f"{file} describes another model: {'; '.join(differing)}. Change [model] to match."
        )


def read_config(file: Path) -> dict[str, Any]:
    """Reads a config.json.

    Raises:
        CheckpointError: if it cannot be read, or is no object of JSON.
    """
    try:
        found = json.loads(file_inside(file.parent, file.name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is corrupted ({error!r}); expected the config.json of a model"
        ) from error
    return found


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of all parameters of the plain model by name."""
    with torch.device("meta"):
        model = MODELS.build(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
