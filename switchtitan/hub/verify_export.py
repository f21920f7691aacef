"""Compare the logits of an exported folder with those of its checkpoint, one block at a time."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint, module_of
from switchtitan.hub.huggingface import WEIGHTS_NAME
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.hub.peft_folder import Adapter, is_adapter
from switchtitan.hub.weight_files import find_weight_files
from switchtitan.models import MODELS

_NUM_TOKENS = 64
_LARGEST_ERRORS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Largest relative error by stored dtype. The sums of merged and of separate factors differ by
rounding; weights in bfloat16 are rounded to 8 bits, and the errors of layers add up."""

ReadTensors = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Names of a model's parameters -> their values."""


def verify_export(checkpoint: DenseCheckpoint, folder: Path, dtype: torch.dtype) -> float:
    """Compares the logits of a checkpoint, with its factors, and of an exported folder.

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
    tokens = torch.randint(
        checkpoint.config.vocab_size,
        (1, _NUM_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    expected = _logits(checkpoint.prepared_model(), _reader_of_checkpoint(checkpoint), tokens)
    adapter = Adapter(folder) if is_adapter(folder) else None
    base = folder if adapter is None else adapter.base
    keys = read_model_folder(base)
    config = MODELS[str(keys["name"])].config_type.model_validate(keys)
    with torch.device("meta"):
        model = MODELS.build(config)
    found = _logits(model.requires_grad_(False).eval(), _reader_of_folder(base, adapter), tokens)
    difference = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    error = float(difference)
    if not error <= _LARGEST_ERRORS[dtype]:
        raise CheckpointError(
            f"the exported model computes other logits than the checkpoint: relative error "
            f"{error:.2g}, expected at most {_LARGEST_ERRORS[dtype]:g}; please report this. "
            "--no-verify writes the folder without this check"
        )
    return error


@torch.no_grad()
@full_precision()
def _logits(model: LanguageModel, read: ReadTensors, tokens: Tensor) -> Tensor:
    """Returns the logits [1, seq, vocabulary] of a model on the meta device.

    Args:
        read: returns fp32 values.
    """
    names_of = {
        block: [f"{name}.{local}" for local, _ in block.named_parameters()]
        for name, block in model.blocks().items()
    }
    in_blocks = {name for names in names_of.values() for name in names}
    prefixes = {block: f"{name}." for name, block in model.blocks().items()}

    def call(block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        values = read(names_of[block])
        local = {name.removeprefix(prefixes[block]): value for name, value in values.items()}
        return functional_call(block, local, (hidden, *args))

    model.call_block = call
    outer = read([name for name, _ in model.named_parameters() if name not in in_blocks])
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    return functional_call(model, dict(outer), (tokens, documents))


def _reader_of_checkpoint(checkpoint: DenseCheckpoint) -> ReadTensors:
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        names = set(names)
        values = checkpoint.read_trained({module_of(name) for name in names})
        return {name: value.float() for name, value in values.items() if name in names}

    return read


def _reader_of_folder(folder: Path, adapter: Adapter | None) -> ReadTensors:
    file_of = {}
    for file in find_weight_files(folder, WEIGHTS_NAME):
        with safe_open(file, framework="pt", device="cpu") as opened:
            file_of.update(dict.fromkeys(opened.keys(), file))

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        values = {}
        for name in names:
            with safe_open(file_of[name], framework="pt", device="cpu") as opened:
                value = opened.get_tensor(name).float()
            values[name] = value if adapter is None else adapter.updated(name, value)
        return values

    return read
