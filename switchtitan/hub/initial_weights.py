"""Dense weights from elsewhere that a new run starts from."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from switchtitan.checkpoint import check_same_run, find_given, read_metadata, read_tensors
from switchtitan.checkpoint.layout import METADATA_FILE, file_record
from switchtitan.contracts import Method
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.huggingface import check_dense, read_dense
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.llama.model import Llama


class InitialWeights(NamedTuple):
    """Weights that a run starts from, and where they lie."""

    source: Path
    """The file or folder that was read, absolute: of a run, the checkpoint that was its newest."""
    tensors: dict[str, Tensor]
    """By the plain model's names."""


def read_initial_weights(path: Path, model: nn.Module, model_section: dict) -> InitialWeights:
    """The plain model's weights from a safetensors file, a folder in Hugging Face's layout, or a checkpoint of any method,
    whose factors are merged.

    Args:
        model: the plain model, for its names and shapes.
        model_section: the configuration that it was built from, as plain values.

    Raises:
        CheckpointError: if there is none at `path`, or it is of another model; names the first few tensors.
    """
    source = path
    if _is_safetensors(path):
        weights = read_dense(path)
    else:
        # What shapes do not show, e.g. the number of heads. How attention is computed is free.
        source = find_given(path)
        saved_section = MODELS.completed(read_metadata(source).identity["model"])  # type: ignore[arg-type]
        check_same_run(
            {"model": saved_section | {"attention": None}}, {"model": model_section | {"attention": None}}
        )
        weights = read_dense_checkpoint(source)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
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
    if _is_safetensors(path) and isinstance(model, Llama):
        check_dense(weights, model.dims, path)
    return InitialWeights(source.absolute(), weights)


def fingerprint(source: Path) -> str:
    """A checksum of what `InitialWeights.source` names: of weight files, or of a checkpoint's metadata, which has theirs."""
    if source.is_dir():
        metadata = source / METADATA_FILE
        files = [metadata] if metadata.is_file() else sorted(source.glob("*.safetensors"))
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


def _saved_method(checkpoint: Path) -> Method:
    metadata = read_metadata(checkpoint)
    section, job = metadata.identity["method"], metadata.identity["job"]
    assert isinstance(section, dict)
    assert isinstance(job, dict)
    try:
        config = METHODS.restore(section)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: expected a method that this version of switchtitan knows ({error})"
        ) from error
    return METHODS.build(config, metadata.step, int(str(job["seed"])))


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))
