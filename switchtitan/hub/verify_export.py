"""Compares the logits of an exported folder with those of its checkpoint, one block at a time."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from switchtitan.contracts import ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError
from switchtitan.hub.huggingface import ReadWeight
from switchtitan.hub.initial_weights import DenseCheckpoint, DenseFolder
from switchtitan.hub.peft_folder import is_adapter
from switchtitan.models import plain_model

_NUM_TOKENS = 64
_WITHOUT_CHECK = "--no-verify writes the folder without this check"


def verify_export(checkpoint: DenseCheckpoint, folder: Path, dtype: torch.dtype) -> float:
    """Compares the logits of a checkpoint's dense weights, rounded, and of an exported folder.

    Returns the root mean square of the difference, divided by that of the checkpoint's logits;
    a CheckpointError if the folder cannot be read, or computes other logits. Computes in fp32 on 64
    random tokens. Holds the weights outside the blocks and one block.

    Args:
        folder: as `export_dense` writes it, or with an adapter. Its config.json is read too.
        dtype: of its weights.
    """
    expected = _logits(checkpoint.config, lambda name: checkpoint.read(name).to(dtype))
    exported = DenseFolder(folder)
    found = _logits(exported.config, exported.read)
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    # Sums in fp32 are rounded in another order; factors in bf16 are rounded by up to 2^-9 each.
    limit = 3e-2 if is_adapter(folder) and dtype != torch.float32 else 1e-4
    if not error <= limit:  # also if it is NaN
        raise CheckpointError(
            f"the exported model computes other logits than the checkpoint: relative error "
            f"{error:.2g}, expected at most {limit:g}; please report this. {_WITHOUT_CHECK}"
        )
    return error


@torch.no_grad()
@full_precision()
def _logits(config: ModelConfig, read: ReadWeight) -> Tensor:
    """Returns the logits [1, seq, vocabulary] of a plain model on random tokens."""
    model = plain_model(config).eval()
    # What is computed from a tensor without values is skipped in places, and no error is raised.
    if without_values := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            f"[model] name = {config.name!r}: the buffer {without_values[0]} is not among the "
            f"weights, so logits cannot be compared; {_WITHOUT_CHECK}"
        )
    for name, block in model.blocks().items():
        block.register_forward_pre_hook(partial(_load, read, f"{name}."))
        block.register_forward_hook(_unload)
    in_blocks = tuple(f"{name}." for name in model.blocks())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, _NUM_TOKENS), generator=generator)
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    outer = [name for name, _ in model.named_parameters() if not name.startswith(in_blocks)]
    values = {name: read(name).float() for name in outer}
    return functional_call(model, values, (tokens, documents))


def _load(read: ReadWeight, prefix: str, block: nn.Module, args: object) -> None:
    values = {name: read(prefix + name).float() for name, _ in block.named_parameters()}
    block.load_state_dict(values, assign=True)


def _unload(block: nn.Module, args: object, output: object) -> None:
    block.to_empty(device="meta")
