"""Folders in Hugging Face's layout, written by transformers, with random models of odd shapes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHAPES: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 54,
    "intermediate_size": 77,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}


def _configs() -> dict[str, Any]:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    default = {"rope_type": "default", "rope_theta": 700.0}
    return {
        "llama": LlamaConfig(**_SHAPES, rms_norm_eps=1e-3, rope_parameters=default),
        "llama, as many key heads": LlamaConfig(**{**_SHAPES, "num_key_value_heads": 9}),
        "llama3, tied": LlamaConfig(
            **_SHAPES, head_dim=8, tie_word_embeddings=True, rope_parameters=_LLAMA3
        ),
        "llama, linear": LlamaConfig(**_SHAPES, rope_parameters=_LINEAR),
        # Heads of a width that hidden_size is no multiple of.
        "mistral": MistralConfig(
            **{**_SHAPES, "num_attention_heads": 12}, head_dim=4, sliding_window=None
        ),
        "qwen2": Qwen2Config(**_SHAPES, rms_norm_eps=1e-5),
        "qwen2, tied": Qwen2Config(**_SHAPES, tie_word_embeddings=True),
    }


KINDS = [
    "llama",
    "llama, as many key heads",
    "llama3, tied",
    "llama, linear",
    "mistral",
    "qwen2",
    "qwen2, tied",
]


def save_random_model(kind: str, folder: Path, max_shard_size: str = "5GB") -> Path:
    """Saves a model whose norms and biases are random too; returns the folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_configs()[kind])
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def draw_tokens(batch: int, seq: int) -> Tensor:
    return torch.randint(0, 1000, (batch, seq), generator=torch.Generator().manual_seed(5))


def logits_of_transformers(folder: Path, tokens: Tensor) -> Tensor:
    """The logits [batch, seq, vocabulary] that transformers computes in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(input_ids=tokens).logits
