"""Read the dense weights that a new run starts from."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from switchtitan.checkpoint import check_same_run, find_given
from switchtitan.checkpoint.checkpointer import SUMS_FILE
from switchtitan.contracts import ModelConfig
from switchtitan.files import sha256_of_file
from switchtitan.hub.dense_checkpoint import read_dense_checkpoint, saved_model_config
from switchtitan.hub.huggingface import check_shapes, read_dense, without_copies
from switchtitan.hub.model_folder import check_model_folder
from switchtitan.hub.peft_folder import (
    ADAPTER_CONFIG_NAME,
    folder_of_model,
    is_adapter,
    read_adapted,
)


class InitialWeights(NamedTuple):
    """Weights that a run starts from, and their source."""

    source: Path
    """The absolute path that was read; for a run's folder, that of its newest checkpoint."""
    tensors: dict[str, Tensor]
    """By the plain model's names."""


def read_initial_weights(path: Path, config: ModelConfig) -> InitialWeights:
    """Reads the plain model's weights.

    Args:
        path: a safetensors file, a folder in Hugging Face's layout or with a PEFT adapter, which is
            merged, or a checkpoint or run of any method.
        config: the plain model's section.

    Raises:
        CheckpointError: if there are no weights at `path`, or they do not match the model.
    """
    source = path
    if path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors"))):
        # Before the shapes, since a key of config.json says more than the shapes that follow.
        check_model_folder(config, path)
        weights = read_adapted(path) if is_adapter(path) else read_dense(path)
        weights = without_copies(weights, config, path)
    else:
        source = find_given(path)
        # Compares what shapes do not show, e.g. the number of heads.
        saved = saved_model_config(source)
        check_same_run({"model": saved.architecture()}, {"model": config.architecture()})
        weights = read_dense_checkpoint(source)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_shapes(shapes, config, f"[checkpoint] initial_weights = {str(path)!r}")
    return InitialWeights(source.absolute(), weights)


def fingerprint(source: Path) -> str:
    """Returns a checksum of the weight files at `source`, or of a checkpoint's checksums."""
    if source.is_file():
        files = [source]
    elif (source / SUMS_FILE).is_file():
        files = [source / SUMS_FILE]
    else:
        folders = dict.fromkeys([source, folder_of_model(source)])  # an ordered set
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        if is_adapter(source):  # the scale of its factors
            files.append(source / ADAPTER_CONFIG_NAME)
    return hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()
