"""Compare the logits of an exported folder with those of its checkpoint, one block at a time."""

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.func import functional_call

from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint, module_of
from switchtitan.hub.huggingface import WEIGHTS_NAME
from switchtitan.hub.model_folder import read_model_folder
from switchtitan.hub.peft_folder import Adapter, is_adapter
from switchtitan.hub.weight_files import find_weight_files
from switchtitan.models import MODELS

_NUM_TOKENS = 64
_LARGEST_ERROR = 1e-4
"""Largest relative error. Sums of merged and of separate factors differ by rounding in fp32."""

ReadTensors = Callable[[Iterable[str]], Mapping[str, Tensor]]
"""Names of a model's parameters -> their values."""


def verify_export(checkpoint: DenseCheckpoint, folder: Path, dtype: torch.dtype) -> float:
    """Compares the logits of a checkpoint, with its factors, and of an exported folder.

    Computes in fp32 on 64 random tokens. Holds the weights outside the blocks and one block. A
    folder in bfloat16 has to compute the logits of the checkpoint's rounded weights, and these
    weights, before they are rounded, those of the checkpoint.

    Args:
        checkpoint: what was exported.
        folder: as `export_dense` writes it, or with an adapter. Its config.json is read too.
        dtype: of its weights.

    Returns:
        The root mean square of the difference, with that of rounding, divided by that of the
        checkpoint's logits.

    Raises:
        CheckpointError: if the folder cannot be read, or computes other logits.
    """
    tokens = torch.randint(
        checkpoint.config.vocab_size,
        (1, _NUM_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )
    trained = _logits(checkpoint.prepared_model(), _reader_of_checkpoint(checkpoint), tokens)
    adapter = Adapter(folder) if is_adapter(folder) else None
    base = folder if adapter is None else adapter.base
    keys = read_model_folder(base)
    config = MODELS[str(keys["name"])].config_type.model_validate(keys)
    found = _logits(_plain_model(config), _reader_of_folder(base, adapter), tokens)
    expected = trained
    if dtype != torch.float32:
        reader = _reader_of_merged if adapter is None else _reader_of_adapted
        model = _plain_model(checkpoint.config)
        _check(_logits(model, reader(checkpoint, torch.float32), tokens), trained)
        expected = _logits(model, reader(checkpoint, dtype), tokens)
    _check(found, expected)
    return _relative_error(found, trained)


def _check(found: Tensor, expected: Tensor) -> None:
    error = _relative_error(found, expected)
    if not error <= _LARGEST_ERROR:
        raise CheckpointError(
            f"the exported model computes other logits than the checkpoint: relative error "
            f"{error:.2g}, expected at most {_LARGEST_ERROR:g}; please report this. "
            "--no-verify writes the folder without this check"
        )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(difference)


def _plain_model(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        model = MODELS.build(config)
    return model.requires_grad_(False).eval()


@torch.no_grad()
@full_precision()
def _logits(model: LanguageModel, read: ReadTensors, tokens: Tensor) -> Tensor:
    """Returns the logits [1, seq, vocabulary] of a model whose parameters are on the meta device.

    Args:
        read: returns fp32 values.
    """
    # What is computed from a tensor without values is skipped in places, and no error is raised.
    if without_values := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            f"the exported model cannot be checked: its buffer {without_values[0]} has no values; "
            "--no-verify writes the folder without this check"
        )
    names_of = {
        block: [f"{name}.{local}" for local, _ in block.named_parameters()]
        for name, block in model.blocks().items()
    }
    in_blocks = {name for names in names_of.values() for name in names}
    prefixes = {block: f"{name}." for name, block in model.blocks().items()}

    def call(block: nn.Module, hidden: Tensor, *args: object) -> Tensor:
        values = read(names_of[block])
        assert values.keys() == set(names_of[block])
        local = {name.removeprefix(prefixes[block]): value for name, value in values.items()}
        return functional_call(block, local, (hidden, *args))

    model.call_block = call
    outer_names = {name for name, _ in model.named_parameters() if name not in in_blocks}
    outer = read(outer_names)
    assert outer.keys() == outer_names
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    return functional_call(model, dict(outer), (tokens, documents))


def _reader_of_checkpoint(checkpoint: DenseCheckpoint) -> ReadTensors:
    def read(names: Iterable[str]) -> dict[str, Tensor]:
        names = set(names)
        values = checkpoint.read_trained({module_of(name) for name in names})
        return {name: value.float() for name, value in values.items() if name in names}

    return read


def _reader_of_merged(checkpoint: DenseCheckpoint, dtype: torch.dtype) -> ReadTensors:
    """Reads the merged weights, rounded to `dtype`."""

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for _, group in groupby(names, module_of):
            read_values = checkpoint.read(group)
            values.update((name, value.to(dtype).float()) for name, value in read_values.items())
        return values

    return read


def _reader_of_adapted(checkpoint: DenseCheckpoint, dtype: torch.dtype) -> ReadTensors:
    """Reads the base weights plus their updates; weights and factors are rounded to `dtype`."""
    updates = checkpoint.low_rank_updates()

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for layer, group in groupby(names, module_of):
            read_values = checkpoint.read_base(group)
            values.update((name, value.to(dtype).float()) for name, value in read_values.items())
            if layer in updates:
                update = checkpoint.read_low_rank_update(layer)
                lora_a, lora_b = (
                    factor.to(dtype).float() for factor in (update.lora_a, update.lora_b)
                )
                weight = f"{layer}.weight"
                values[weight] = values[weight] + update.scale * (lora_b.t() @ lora_a)
        return values

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
