"""Compare the logits of an exported folder with those of its checkpoint, one block at a time."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from switchtitan.contracts import ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.huggingface import read_dense
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.hub.peft_folder import Adapter, is_adapter
from switchtitan.models import MODELS

_NUM_TOKENS = 64
_LARGEST_ERROR = 1e-4
"""Largest relative error: sums of merged and of separate factors differ by rounding in fp32."""
_LARGEST_ERROR_OF_ROUNDED_FACTORS = 3e-2
"""Of an adapter in bf16: each element is rounded by up to 2^-9."""
_WITHOUT_CHECK = "--no-verify writes the folder without this check"

ReadTensors = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Names of a model's parameters -> their values."""


def verify_export(checkpoint: DenseCheckpoint, folder: Path, dtype: torch.dtype) -> float:
    """Compares the logits of a checkpoint's dense weights and of an exported folder.

    Computes in fp32 on 64 random tokens. Holds the weights outside the blocks and one block.

    Args:
        checkpoint: what was exported.
        folder: as `export_dense` writes it, or with an adapter. Its config.json is read too.
        dtype: of its weights.

    Returns:
        The root mean square of the difference, divided by that of the checkpoint's logits.

    Raises:
        CheckpointError: if the folder cannot be read, or computes other logits.
    """
    adapter = Adapter(folder) if is_adapter(folder) else None
    base = folder if adapter is None else adapter.base
    stored = read_dense(base)

    def read_stored(names: Iterable[str]) -> dict[str, Tensor]:
        values = {name: stored[name].float() for name in names}
        if adapter is None:
            return values
        return {name: adapter.updated(name, value) for name, value in values.items()}

    expected = _logits(checkpoint.config, checkpoint.read)
    found = _logits(MODELS.restore(read_model_folder(base)), read_stored)
    if dtype == torch.float32:
        _check(found, expected, _LARGEST_ERROR)
    elif adapter is None:

        def read_rounded(names: Iterable[str]) -> dict[str, Tensor]:
            values = checkpoint.read(names)
            return {name: value.to(dtype).float() for name, value in values.items()}

        _check(found, _logits(checkpoint.config, read_rounded), _LARGEST_ERROR)
    else:
        _check(found, expected, _LARGEST_ERROR_OF_ROUNDED_FACTORS)
    return _relative_error(found, expected)


def _check(found: Tensor, expected: Tensor, limit: float) -> None:
    error = _relative_error(found, expected)
    if not error <= limit:  # also if it is NaN
        raise CheckpointError(
            f"the exported model computes other logits than the checkpoint: relative error "
            f"{error:.2g}, expected at most {limit:g}; please report this. {_WITHOUT_CHECK}"
        )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@torch.no_grad()
@full_precision()
def _logits(config: ModelConfig, read: ReadTensors) -> Tensor:
    """Returns the logits [1, seq, vocabulary] of a plain model on random tokens.

    Args:
        read: returns fp32 values.
    """
    with torch.device("meta"):
        model = MODELS.build(config).eval()
    # What is computed from a tensor without values is skipped in places, and no error is raised.
    if without_values := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            f"[model] name = {config.name!r}: the buffer {without_values[0]} is not among the "
            f"weights, so logits cannot be compared; {_WITHOUT_CHECK}"
        )
    name_of = {block: name for name, block in model.blocks().items()}

    def call(block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        prefix = f"{name_of[block]}."
        values = read([f"{prefix}{name}" for name, _ in block.named_parameters()])
        local = {name.removeprefix(prefix): value for name, value in values.items()}
        return functional_call(block, local, (hidden, *args), strict=True)

    model.call_block = call
    in_blocks = tuple(f"{name}." for name in model.blocks())
    outer = [name for name, _ in model.named_parameters() if not name.startswith(in_blocks)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, _NUM_TOKENS), generator=generator)
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    return functional_call(model, dict(read(outer)), (tokens, documents))
