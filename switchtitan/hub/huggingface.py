"""Dense LLaMA weights to and from folders that `transformers.AutoModelForCausalLM.from_pretrained` loads.

Names and values are the same on both sides: reading and writing change neither.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from switchtitan.errors import CheckpointError, CorpusError
from switchtitan.hub.weight_files import check_shapes, find_weight_files
from switchtitan.models.llama.config import LlamaDimensions

WEIGHTS_NAME = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9
"""Above this the weights are split over several files."""


def export_dense(
    state: dict[str, Tensor],
    dims: LlamaDimensions,
    folder: Path,
    dtype: torch.dtype,
    *,
    seq_len: int = 2048,
    tokenizer_file: Path | None = None,
    eos_id: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that Hugging Face's LlamaForCausalLM loads: config, weights and a tokenizer if given.

    The folder is written beside its place and renamed at the end, so it is never there half-written.

    Args:
        state: all weights of the plain model by name, any device and floating type.
        folder: where to; must not exist or be empty.
        dtype: the type in which weights are stored.
        seq_len: tokens per sequence in training; goes into the config as max_position_embeddings.
        tokenizer_file: a tokenizer.json to put beside the weights.
        eos_id: the token that ends a document.
        max_shard_bytes: a weights file is closed before it grows beyond this.

    Raises:
        CheckpointError: if the folder is not empty, or names or shapes do not fit `dims`.
        CorpusError: if the tokenizer cannot be read or does not know `eos_id`.
    """
    check_shapes(state, dims.parameter_shapes(), "the model to export", "Export the merged, dense weights.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not empty; choose another folder or remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_json(partial / "config.json", _huggingface_config(dims, dtype, seq_len, eos_id))
        if tokenizer_file is not None:
            _write_tokenizer(tokenizer_file, partial, seq_len, eos_id)
        _write_weights(state, partial, dtype, max_shard_bytes)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_dense(path: Path) -> dict[str, Tensor]:
    """All weights by name from a safetensors file or a folder in Hugging Face's layout, memory-mapped.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in find_weight_files(path, WEIGHTS_NAME):
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({error}); fetch it again"
            ) from error
    return tensors


def check_dense(tensors: dict[str, Tensor], dims: LlamaDimensions, path: Path) -> None:
    """Makes sure that weights fit the model: names, shapes and what a config.json beside them says.

    Args:
        tensors: weights by name.
        dims: of the model that they are meant for.
        path: the file or folder that they were read from.

    Raises:
        CheckpointError: names the weights, or the keys of config.json, that differ.
    """
    hint = "Choose the [model] size and overrides that these weights were trained with."
    check_shapes(tensors, dims.parameter_shapes(), path, hint)
    config = (path if path.is_dir() else path.parent) / "config.json"
    if config.is_file():
        _check_config(config, dims)


def _check_config(file: Path, dims: LlamaDimensions) -> None:
    """What shapes do not show: heads, norm epsilon, activation, rotary positions."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        found = {
            "num_attention_heads": config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "hidden_act": config.get("hidden_act", "silu"),
            **_read_rope(config),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}); expected a LlamaConfig") from error
    expected = {
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "rms_norm_eps": dims.norm_eps,
        "hidden_act": "silu",
        "rope_theta": dims.rope_theta,
        "rope_type": "default",
    }
    differing = [
        f"{key} = {found[key]!r}, the model has {value!r}"
        for key, value in expected.items()
        if found[key] != value
    ]
    if differing:
        raise CheckpointError(f"{file} describes another model: {'; '.join(differing)}. Adapt [model].")


def _read_rope(config: dict) -> dict[str, object]:
    """Since version 5 transformers writes one table, rope_parameters; before, rope_theta and rope_scaling."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = table.get("rope_theta", config.get("rope_theta", 10000.0))
    return {"rope_theta": theta, "rope_type": table.get("rope_type", table.get("type", "default"))}


def _huggingface_config(
    dims: LlamaDimensions, dtype: torch.dtype, seq_len: int, eos_id: int | None
) -> dict[str, object]:
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dims.hidden_size,
        "intermediate_size": dims.intermediate_size,
        "num_hidden_layers": dims.num_layers,
        "num_attention_heads": dims.num_heads,
        "num_key_value_heads": dims.num_kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab_size,
        "rms_norm_eps": dims.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": dims.init_std,
        "max_position_embeddings": seq_len,
        # Both spellings, of transformers 4 and 5.
        "rope_theta": dims.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_theta},
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
    }


def _write_tokenizer(tokenizer_file: Path, folder: Path, seq_len: int, eos_id: int | None) -> None:
    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CorpusError(f"{tokenizer_file} is not a tokenizer.json ({error})") from error
    settings: dict[str, object] = {
        # The class that takes everything from tokenizer.json; LLaMA's own would rebuild its pre-tokenizer.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
    }
    if eos_id is not None:
        eos_token = tokenizer.id_to_token(eos_id)
        if eos_token is None:
            raise CorpusError(f"{tokenizer_file} has no token {eos_id}, given as the end of a document")
        settings["eos_token"] = eos_token
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    _write_json(folder / "tokenizer_config.json", settings)


def _write_weights(state: dict[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards = _split_into_shards(state, dtype.itemsize, max_shard_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = WEIGHTS_NAME
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        converted = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        save_file(converted, folder / file_name, metadata={"format": "pt"})
        # Else only its owner may read it.
        shutil.copymode(folder / "config.json", folder / file_name)
        file_of.update(dict.fromkeys(names, file_name))
    if len(shards) > 1:
        total_size = sum(value.numel() for value in state.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total_size}, "weight_map": file_of}
        _write_json(folder / f"{WEIGHTS_NAME}.index.json", index)


def _split_into_shards(state: dict[str, Tensor], itemsize: int, max_shard_bytes: int) -> list[list[str]]:
    """Names in order, cut before a shard exceeds the limit; a tensor above the limit stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, value in state.items():
        num_bytes = value.numel() * itemsize
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
    return shards


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
