"""Reads the dense weights that a new run starts from, and the model that their folder describes."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.checkpoint.load import find_given
from switchtitan.checkpoint.save import SUMS_FILE
from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import sha256_of_file
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.huggingface import CONFIG_NAME, check_shapes, read_config, read_dense
from switchtitan.hub.peft_folder import (
    ADAPTER_CONFIG_NAME,
    folder_of_model,
    folders_of,
    is_adapter,
    merging_reader,
)
from switchtitan.models import MODELS


def find_weights(path: Path) -> Path:
    """Returns the absolute path of weights: a safetensors file, a folder in Hugging Face's layout
    or with a PEFT adapter, which is merged, or a checkpoint or run of any method, whose newest
    checkpoint is read, and its checksums compared. Raises a CheckpointError if there are none."""
    return (path if _has_safetensors(path) else find_given(path)).absolute()


class DenseFolder:
    """Weights of a safetensors file, or of a folder in Hugging Face's layout or with an adapter;
    memory-mapped. See `open_weights`."""

    metadata = None

    def __init__(self, source: Path, config: ModelConfig | None = None) -> None:
        file = folders_of(source)[-1] / CONFIG_NAME
        if config is None or file.is_file():
            described = MODELS.restore(read_model_folder(file.parent))
            config = config or described
            _check_same_model(described, config, file)
        weights = without_copies(read_dense(folder_of_model(source)), config, source)
        check_shapes(weights, config, f"[checkpoint] initial_weights = {str(source)!r}")
        self.config, self.read = config, merging_reader(source, weights)

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Returns rows of a weight."""
        return self.read(name)[rows.start : rows.stop]


def open_weights(source: Path, config: ModelConfig | None) -> DenseCheckpoint | DenseFolder:
    """Opens the plain model's weights at a path that `find_weights` returned.

    `config`, the model's section, is by default the checkpoint's, or the one that a config.json
    next to the weights describes. Raises a CheckpointError if the weights do not match it, a
    ConfigError if there is none, or it describes no model that is supported.
    """
    if _has_safetensors(source):
        return DenseFolder(source, config)
    dense = DenseCheckpoint(source)
    _check_same_model(dense.config, config or dense.config, source)
    return dense


def _has_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))


def _check_same_model(theirs: ModelConfig, ours: ModelConfig, source: Path) -> None:
    """Compares also what shapes do not show, e.g. the number of heads."""
    found, expected = theirs.architecture(), ours.architecture()
    differing = "; ".join(
        f"{key} = {found.get(key)!r}, [model] has {expected.get(key)!r}"
        for key in expected | found
        if found.get(key) != expected.get(key)
    )
    if differing:
        raise CheckpointError(
            f"{source} describes another model: {differing}. Change [model] to match."
        )


def checksum(source: Path) -> str:
    """Returns a checksum of the weight files at `source`, or of a checkpoint's checksums."""
    files = [source] if source.is_file() else [*source.glob(SUMS_FILE)]
    if not files:
        files = [file for of in folders_of(source) for file in sorted(of.glob("*.safetensors"))]
        if is_adapter(source):  # the scale of its factors
            files.append(source / ADAPTER_CONFIG_NAME)
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()


# The model that a folder describes.
def read_model_folder(folder: Path) -> dict[str, object]:
    """Returns all keys of `[model]` that a folder's config.json determines, with `name`.

    The folder is in Hugging Face's layout, or has a PEFT adapter, whose base model is read. Raises
    a ConfigError if there is no config.json, or it describes a model that is not supported, which
    names the keys, and what is supported.
    """
    try:
        file = folder_of_model(folder) / CONFIG_NAME
        found = read_config(file)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    model_type, supported = found.get("model_type"), set[str]()
    for name, config_type in MODELS.config_types().items():
        supported |= config_type.huggingface_types
        if str(model_type) in config_type.huggingface_types:
            try:
                return {"name": name, **config_type.keys_from_huggingface(found)}
            except ConfigError as error:
                raise ConfigError(f"{file}: {error}") from error
    expected = ", ".join(map(repr, sorted(supported)))
    raise ConfigError(f"{file}: model_type = {model_type!r}: expected one of {expected}")


def without_copies(
    tensors: dict[str, Tensor], config: ModelConfig, path: Path
) -> dict[str, Tensor]:
    """Returns the weights without those that repeat another, such as a tied head's. Raises a
    CheckpointError if a copy differs from the weight that it repeats."""
    kept = dict(tensors)
    for copy, name in config.weight_copies().items():
        if copy not in kept:
            continue
        repeated = kept.pop(copy)
        weight = kept.setdefault(name, repeated)
        if weight.dtype != repeated.dtype or not torch.equal(weight, repeated):
            raise CheckpointError(
                f"{path}: {copy} and {name} differ, but the model's head is tied "
                "(tie_word_embeddings in config.json); remove one of them, or untie the head"
            )
    return kept
