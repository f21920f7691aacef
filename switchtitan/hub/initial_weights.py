"""Dense weights from elsewhere that a new run starts from."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from switchtitan.checkpoint import check_same_run, find_given, read_metadata, read_tensors
from switchtitan.checkpoint.layout import METADATA_FILE, file_record
from switchtitan.contracts import Method, ModelConfig
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.huggingface import check_dense, parameter_shapes, read_dense
from switchtitan.hub.original import SCALE_FILE, is_original, read_original_dense
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.registry import ConfigT, Registry


class InitialWeights(NamedTuple):
    """Weights that a run starts from, and where they lie."""

    source: Path
    """The file or folder that was read, absolute: of a run, the checkpoint that was its newest."""
    tensors: dict[str, Tensor]
    """By the plain model's names."""


def read_initial_weights(path: Path, config: ModelConfig) -> InitialWeights:
    """The plain model's weights from a safetensors file, a folder in Hugging Face's layout, a folder `model_<step>` of the
    original implementation, or a checkpoint of any method.

    Args:
        config: of the plain model that they are for.

    Raises:
        CheckpointError: if there are none at `path`, or they are of another model; names the first few tensors.
    """
    is_checkpoint = not _is_safetensors(path) and not is_original(path)
    source = find_given(path) if is_checkpoint else path
    if is_checkpoint:
        # What shapes do not show, e.g. the number of heads.
        saved = saved_model_config(source)
        check_same_run({"model": saved.architecture()}, {"model": config.architecture()})
        weights = read_dense_checkpoint(source)
    else:
        weights = read_original_dense(path) if is_original(path) else read_dense(path)
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
            f"[checkpoint] initial_weights = {str(path)!r}: {len(differing)} of the weights do not fit the model ({examples}); "
            "choose the [model] that they belong to"
        )
    if not is_checkpoint:
        check_dense(weights, config, path)
    return InitialWeights(source.absolute(), weights)


def fingerprint(source: Path) -> str:
    """A checksum of what `InitialWeights.source` names: of weight files, or of a checkpoint's metadata, which has theirs."""
    if source.is_dir():
        metadata = source / METADATA_FILE
        files = [metadata] if metadata.is_file() else sorted(source.glob("*.safetensors"))
        files = files or sorted([*source.glob("*.bin"), *source.glob(SCALE_FILE)])
    else:
        files = [source]
    return hashlib.sha256("".join(file_record(file).sha256 for file in files).encode()).hexdigest()


def read_dense_checkpoint(path: Path) -> dict[str, Tensor]:
    """The dense fp32 weights of a checkpoint of any method, by the plain model's names.

    Raises:
        CheckpointError: if there is no complete checkpoint at `path`, or its method is not one that
            this version knows.
    """
    checkpoint = find_given(path)
    return _saved_method(checkpoint).dense_weights(read_tensors(checkpoint, prefix="model."))


def saved_model_config(checkpoint: Path) -> ModelConfig:
    """The section `[model]` of the run that wrote a checkpoint.

    Raises:
        CheckpointError: if its metadata describe no model that this version knows.
    """
    return _restore(checkpoint, MODELS)


def _saved_method(checkpoint: Path) -> Method:
    metadata = read_metadata(checkpoint)
    job = metadata.identity["job"]
    assert isinstance(job, dict)
    return METHODS.build(_restore(checkpoint, METHODS), metadata.step, int(str(job["seed"])))


def _restore(checkpoint: Path, registry: Registry[ConfigT, Any]) -> ConfigT:
    section = read_metadata(checkpoint).identity.get(registry.kind)
    if not isinstance(section, dict):
        raise CheckpointError(f"{checkpoint}: its metadata describe no {registry.kind}")
    try:
        return registry.restore(section)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: expected a {registry.kind} that this version of switchtitan knows ({error})"
        ) from error


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))
