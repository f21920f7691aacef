"""What a folder contains, and random models of odd shapes in Hugging Face's layout."""

import json

import torch

from switchtitan.hub.huggingface import parameter_shapes
from switchtitan.hub.initial_weights import find_weights, open_weights

_SHAPES = {
    "vocab_size": 1000,
    "hidden_size": 54,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
_DEFAULT = {"rope_type": "default", "rope_theta": 700.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


KINDS = {
    "llama": {"rms_norm_eps": 1e-3, "rope_parameters": _DEFAULT},
    "llama, as many key heads": {"num_key_value_heads": 9},
    "llama3, tied": {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
    "llama, linear": {"rope_parameters": _LINEAR},
    # Heads of a width that hidden_size is no multiple of.
    "mistral": {"num_attention_heads": 12, "head_dim": 4, "sliding_window": None},
    "qwen2": {"rms_norm_eps": 1e-5},
    "qwen2, tied": {"tie_word_embeddings": True},
}
"""Name, which begins with the model's -> its settings."""


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def contents(folder):
    """The time of its last change and the bytes of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def save_random_model(kind, folder, max_shard_size="5GB", **settings):
    """Saves a model whose norms and biases are random too; returns the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = kind.partition(",")[0].removesuffix("3")
    config = AutoConfig.for_model(name, **{**_SHAPES, **KINDS[kind], **settings})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def random_weights(model, seed=1):
    """Weights of a model's configuration, by name; norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.02 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in parameter_shapes(model).items()
    }


def read_weights(path, config=None):
    """Returns all weights of a folder, a file or a checkpoint, by name."""
    weights = open_weights(find_weights(path), config)
    return {name: weights.read(name) for name in parameter_shapes(weights.config)}


def with_header(data, change):
    """A file of safetensors whose header is the JSON that `change` makes of its values."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8:end])).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


def change_json(file, changes):
    """Changes keys of a file of JSON; `...` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: content[key] for key in content if content[key] is not ...}))
