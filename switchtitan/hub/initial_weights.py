"""Dense weights from elsewhere that a new run starts from."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from switchtitan.checkpoint import check_same_run, find_given, read_metadata, read_tensors
from switchtitan.checkpoint.layout import METADATA_FILE
from switchtitan.checkpoint.metadata import file_record
from switchtitan.errors import CheckpointError
from switchtitan.hub.huggingface import check_dense, read_dense
from switchtitan.methods.lowrank import merge_factors
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
        weights = _merge_checkpoint(source)
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


def read_merged_checkpoint(path: Path) -> dict[str, Tensor]:
    """The dense fp32 weights that a checkpoint of this project amounts to, whole.

    Raises:
        CheckpointError: if there is no whole checkpoint at `path`.
    """
    return _merge_checkpoint(find_given(path))


def _merge_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    method = read_metadata(checkpoint).identity["method"]
    assert isinstance(method, dict)
    # Methods whose rank is not that of factors beside a weight have no alpha.
    scale = float(method["alpha"]) / int(method["rank"]) if "alpha" in method else 0.0  # type: ignore[arg-type]
    return merge_factors(read_tensors(checkpoint, prefix="model."), scale)


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))
