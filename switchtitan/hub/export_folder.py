"""Writes folders that `transformers.AutoModelForCausalLM.from_pretrained` loads, and compares their
logits with those of the checkpoint."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from switchtitan.checkpoint.save import CheckpointMetadata
from switchtitan.contracts import ModelConfig
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, OutputError
from switchtitan.files import make_folder, rename_complete, sync_tree
from switchtitan.hub.huggingface import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ReadWeight,
    parameter_shapes,
    write_json,
)
from switchtitan.hub.initial_weights import DenseCheckpoint, DenseFolder
from switchtitan.hub.peft_folder import is_adapter
from switchtitan.models import plain_model
from switchtitan.progress import progress_bar

MAX_SHARD_BYTES = 5 * 10**9
"""Larger weights are split over several files."""
_NUM_TOKENS = 64
_WITHOUT_CHECK = "--no-verify writes the folder without this check"
# No string of JSON or TOML contains the fence at the start of a line.
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [switchtitan]
---

# A language model trained with switchtitan

{files}
The run did not tune it to follow instructions. Its license is for its owner to choose.

## Checkpoint

~~~~~~~~json
{about}
~~~~~~~~

## Configuration of the run

~~~~~~~~toml
{config}
~~~~~~~~
"""


def export_dense(
    read: ReadWeight,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    seq_len: int = 2048,
    tokenizer: DocumentTokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that transformers loads: config, weights and, if given, a tokenizer.

    Holds one weights file and one weight in memory. Raises a CheckpointError if transformers has no
    class for the model.

    Args:
        read: of the model's weights.
        folder: created if it does not exist, e.g. in a `new_folder`.
        seq_len: tokens per sequence in training; max_position_embeddings in the config.
        max_shard_bytes: the maximum size of a weights file, unless one tensor is larger.
    """
    huggingface_config = config.huggingface_config(seq_len)
    if huggingface_config is None:
        raise CheckpointError(
            f"[model] name = {config.name!r}: transformers has no class for this model; evaluate "
            "and generate read the run's own checkpoint"
        )
    eos_id = None if tokenizer is None else tokenizer.eos_id
    bos_id = next(iter(() if tokenizer is None else tokenizer.bos_ids), None)
    tokens = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": None}
    dtype_name = str(dtype).removeprefix("torch.")
    dtypes = {"torch_dtype": dtype_name, "dtype": dtype_name}  # of transformers 4 and 5
    in_generation = {"do_sample": True, **tokens, "pad_token_id": eos_id}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_NAME, {**huggingface_config, **dtypes, **tokens})
    write_json(folder / "generation_config.json", in_generation)
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer.serialized, encoding="utf-8")
        settings = {
            # It uses tokenizer.json unchanged; LlamaTokenizer would rebuild the pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": seq_len,
            "eos_token": tokenizer.eos_token,
            **({"bos_token": tokenizer.bos_token} if tokenizer.bos_ids else {}),
        }
        write_json(folder / "tokenizer_config.json", settings)
    _write_weights(read, parameter_shapes(config), folder, dtype, max_shard_bytes)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder `.NAME.partial`, flushed and renamed to `folder` if the block succeeds. If
    it fails, or is interrupted, nothing is left but the folders above it. Raises a CheckpointError
    if the folder exists and is not empty, an OutputError if it cannot be written, or its partial
    folder exists."""
    try:
        folder = Path(os.path.realpath(folder))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} exists and is not empty; choose another folder or remove it first"
            )
        make_folder(folder.parent)
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir()
        try:
            yield partial
            sync_tree(partial)
            rename_complete(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} cannot be written ({error}); choose another folder, free space on its disk, "
            "or delete the partial folder if no other process is writing it"
        ) from error


def _write_weights(
    read: ReadWeight,
    shapes: Mapping[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    shards = split_state_dict_into_shards_factory(
        dict(shapes),
        get_storage_size=lambda shape: prod(shape) * dtype.itemsize,
        filename_pattern=WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    with progress_bar("exporting", total=len(shapes), unit="weights") as progress:
        for file_name, names in shards.filename_to_tensors.items():
            converted: dict[str, Tensor] = {}
            for name in names:
                converted[name] = read(name).to(dtype).contiguous()
                progress.update()
            save_file(converted, folder / file_name, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(folder / CONFIG_NAME, folder / file_name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / f"{WEIGHTS_NAME}.index.json", index)


def write_model_card(metadata: CheckpointMetadata, folder: Path, command: str, files: str) -> None:
    """Writes what the model is, its checkpoint's losses and facts, and the run's configuration.
    `files` says what the folder holds, which `command` exported, and how to load it."""
    facts = metadata.model_dump(include={"step", "train_state", "run", "versions"})
    facts["run"].pop("config")
    about = json.dumps(facts | {"exported_by": command}, indent=2)
    card = _CARD.format(files=files, about=about, config=metadata.config.strip())
    (folder / "README.md").write_text(card, encoding="utf-8")


# The comparison, one block at a time.
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
