"""Write folders that `transformers.AutoModelForCausalLM.from_pretrained` loads."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from switchtitan.contracts import ModelConfig
from switchtitan.errors import CheckpointError, CorpusError, OutputError
from switchtitan.files import make_folder, sync_folder, sync_tree
from switchtitan.hub.dense_checkpoint import module_of
from switchtitan.hub.huggingface import CONFIG_NAME, WEIGHTS_NAME, check_shapes, write_json
from switchtitan.process import progress_bar

MAX_SHARD_BYTES = 5 * 10**9
"""Larger weights are split over several files."""


class DenseWeights(Protocol):
    """The weights of a plain model, read on request: a checkpoint's, or its base's for PEFT."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, names: Iterable[str]) -> Mapping[str, Tensor]: ...


def export_dense(
    weights: DenseWeights,
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    *,
    seq_len: int = 2048,
    tokenizer_file: Path | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    finish: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder that transformers loads: config, weights and, if given, a tokenizer.

    Writes a `new_folder`. Holds one weights file and one layer in memory.

    Args:
        folder: the folder to write, absent or empty.
        dtype: of the stored weights.
        seq_len: tokens per sequence in training; max_position_embeddings in the config.
        tokenizer_file: a tokenizer.json to copy next to the weights.
        eos_id: the token that ends a document.
        max_shard_bytes: the maximum size of a weights file, unless one tensor is larger.
        finish: called with the partial folder: adds files, or raises if the folder is not right.

    Raises:
        CheckpointError: if the folder is not empty, names or shapes do not match the model, or
            transformers has no class for it.
        CorpusError: if the tokenizer cannot be read or has no token `eos_id`.
        OutputError: if the folder cannot be written, or another process is writing it.
    """
    huggingface_config = config.huggingface_config(seq_len)
    if huggingface_config is None:
        raise CheckpointError(
            f"[model] name = {config.name!r}: transformers has no class for this model; evaluate "
            "and generate read the run's own checkpoint"
        )
    check_shapes(weights.shapes, config, "the model to export")
    tokens = {"bos_token_id": None, "eos_token_id": eos_id}
    dtype_name = str(dtype).removeprefix("torch.")
    dtypes = {"torch_dtype": dtype_name, "dtype": dtype_name}  # of transformers 4 and 5
    in_generation = {"do_sample": True, **tokens, "pad_token_id": eos_id}
    with new_folder(folder) as partial:
        write_json(
            partial / CONFIG_NAME, {**huggingface_config, **dtypes, **tokens, "pad_token_id": None}
        )
        write_json(partial / "generation_config.json", in_generation)
        if tokenizer_file is not None:
            _write_tokenizer(tokenizer_file, partial, seq_len, eos_id)
        _write_weights(weights, partial, dtype, max_shard_bytes)
        finish(partial)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder `.NAME.partial`, flushed and renamed to `folder` if the block succeeds.

    If the block fails, or is interrupted, nothing is left.

    Args:
        folder: absent or empty. Folders above it are created.

    Raises:
        CheckpointError: if the folder is not empty.
        OutputError: if it cannot be written, or its partial folder exists.
    """
    try:
        folder = Path(os.path.realpath(folder))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} exists and is not empty; choose another folder or remove it first"
            )
        make_folder(folder.parent)
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            partial.mkdir()
        except FileExistsError as error:
            raise OutputError(
                f"{folder}: another process is writing this folder; if none is, it was killed: "
                f"delete {partial}"
            ) from error
        try:
            yield partial
            sync_tree(partial)
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{folder} cannot be written ({error}); choose another folder, or free space on its "
            "disk"
        ) from error


def _write_tokenizer(tokenizer_file: Path, folder: Path, seq_len: int, eos_id: int | None) -> None:
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CorpusError(f"{tokenizer_file} is not a tokenizer.json ({error})") from error
    # This class uses tokenizer.json unchanged; LlamaTokenizer would rebuild the pre-tokenizer.
    settings: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings["model_max_length"] = seq_len
    if eos_id is not None:
        eos_token = tokenizer.id_to_token(eos_id)
        if eos_token is None:
            raise CorpusError(f"{tokenizer_file} has no token {eos_id}, the end-of-document token")
        settings["eos_token"] = eos_token
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", settings)


def _write_weights(
    weights: DenseWeights, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    shards = split_state_dict_into_shards_factory(
        dict(weights.shapes),
        get_storage_size=lambda shape: prod(shape) * dtype.itemsize,
        filename_pattern=WEIGHTS_NAME.replace(".", "{suffix}."),
        max_shard_size=max_shard_bytes,
    )
    with progress_bar("exporting", total=len(weights.shapes), unit="weights") as progress:
        for file_name, names in shards.filename_to_tensors.items():
            converted: dict[str, Tensor] = {}
            for _, group in groupby(names, module_of):
                for name, value in weights.read(group).items():
                    converted[name] = value.detach().to("cpu", dtype).contiguous()
                    progress.update()
            save_file(converted, folder / file_name, metadata={"format": "pt"})
            # safetensors creates files that only their owner can read.
            shutil.copymode(folder / CONFIG_NAME, folder / file_name)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / f"{WEIGHTS_NAME}.index.json", index)
