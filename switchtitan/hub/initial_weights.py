"""Read the dense weights that a new run starts from."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from switchtitan.checkpoint import check_same_run, find_given, read_metadata, read_tensors
from switchtitan.checkpoint.layout import METADATA_FILE
from switchtitan.checkpoint.metadata import file_record
from switchtitan.contracts import Method, ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.huggingface import (
    check_config,
    parameter_shapes,
    read_dense,
    without_copies,
)
from switchtitan.hub.original import SCALE_FILE, is_original, read_original_dense
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.registry import ConfigT, Registry


class InitialWeights(NamedTuple):
    """Weights that a run starts from, and their source."""

    source: Path
    """The absolute path that was read; for a run's folder, that of its newest checkpoint."""
    tensors: dict[str, Tensor]
    """By the plain model's names."""


def read_initial_weights(path: Path, config: ModelConfig) -> InitialWeights:
    """Reads the plain model's weights.

    `path` is a safetensors file, a folder in Hugging Face's layout, a folder `model_<step>` of the
    original implementation, or a checkpoint or run of any method.

    Args:
        config: the plain model's section.

    Raises:
        CheckpointError: if there are no weights at `path`, or they do not match the model.
    """
    is_checkpoint = not _is_safetensors(path) and not is_original(path)
    source = find_given(path) if is_checkpoint else path
    if is_checkpoint:
        # Compares what shapes do not show, e.g. the number of heads.
        saved = saved_model_config(source)
        check_same_run({"model": saved.architecture()}, {"model": config.architecture()})
        weights = read_dense_checkpoint(source)
    else:
        # Before the shapes, since a key of config.json says more than the shapes that follow.
        check_config(config, path)
        weights = read_original_dense(path) if is_original(path) else read_dense(path)
        weights = without_copies(weights, config, path)
    expected = parameter_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if differing:
        examples = "; ".join(
            f"{name} is {found.get(name, 'missing')}, expected {expected.get(name, 'none')}"
            for name in differing[:4]
        )
        raise CheckpointError(
            f"[checkpoint] initial_weights = {str(path)!r}: {len(differing)} weights do not match "
            f"the model ({examples}); use the [model] that they belong to"
        )
    return InitialWeights(source.absolute(), weights)


def fingerprint(source: Path) -> str:
    """Returns a checksum of the weight files at `source`, or of a checkpoint's metadata."""
    if source.is_dir():
        metadata = source / METADATA_FILE
        files = [metadata] if metadata.is_file() else sorted(source.glob("*.safetensors"))
        files = files or sorted([*source.glob("*.bin"), *source.glob(SCALE_FILE)])
    else:
        files = [source]
    return hashlib.sha256("".join(file_record(file).sha256 for file in files).encode()).hexdigest()


@full_precision()
def read_dense_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the dense fp32 weights of a checkpoint of any method, by the plain model's names.

    Args:
        checkpoint: as `find_given` returns it, which has verified all its bytes.

    Raises:
        CheckpointError: if the checkpoint is not complete, or this version does not know its
            method.
    """
    return _saved_method(checkpoint).dense_weights(read_tensors(checkpoint, prefix="model."))


def saved_model_config(checkpoint: Path) -> ModelConfig:
    """Returns the section `[model]` of the run that saved a checkpoint.

    Raises:
        CheckpointError: if this version does not know its model.
    """
    return _restore(checkpoint, MODELS)


def _saved_method(checkpoint: Path) -> Method:
    metadata = read_metadata(checkpoint)
    seed = metadata.identity_number("job", "seed")
    return METHODS.build(_restore(checkpoint, METHODS), metadata.step, seed)


def _restore(checkpoint: Path, registry: Registry[ConfigT, Any]) -> ConfigT:
    section = read_metadata(checkpoint).identity.get(registry.kind)
    if not isinstance(section, dict):
        raise CheckpointError(f"{checkpoint}: metadata.json has no section for the {registry.kind}")
    try:
        return registry.restore(section)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: this version of switchtitan does not know its {registry.kind} ({error})"
        ) from error


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))
