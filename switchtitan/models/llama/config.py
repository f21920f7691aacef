"""The `[model]` section for LLaMA: the table of sizes, overrides and derived shapes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from switchtitan.contracts import ModelConfig
from switchtitan.models.llama.attention import check_attention

SIZES: dict[str, tuple[int, int, int, int]] = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
"""Hidden size, intermediate size, layers and heads of the published runs (arXiv 2406.06564)."""


@dataclass(frozen=True)
class LlamaDimensions:
    """Everything that determines a LLaMA's shapes and function, with `size` resolved."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    init_std: float

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; equals that of all value heads."""
        return self.num_kv_heads * self.head_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of all linear layers and the head, by qualified name, in order."""
        hidden, wide = self.hidden_size, self.intermediate_size
        of_block = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (self.kv_size, hidden),
            "self_attn.v_proj": (self.kv_size, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        shapes = {
            f"model.layers.{index}.{name}": shape
            for index in range(self.num_layers)
            for name, shape in of_block.items()
        }
        return {**shapes, "lm_head": (self.vocab_size, hidden)}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of all parameters of the plain model by state-dict name."""
        norms = [
            f"model.layers.{index}.{norm}.weight"
            for index in range(self.num_layers)
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        return {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            **{f"{name}.weight": shape for name, shape in self.linear_shapes().items()},
            **dict.fromkeys([*norms, "model.norm.weight"], (self.hidden_size,)),
        }


class LlamaConfig(ModelConfig):
    """LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases, an untied head."""

    name: Literal["llama"] = "llama"
    """Name of the model."""
    size: Literal["9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "3b", "7b"]
    """Row of the table of sizes: sets hidden_size, intermediate_size, num_layers and num_heads."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the residual stream; unset: from `size`. A multiple of 2 * num_heads."""
    intermediate_size: int | None = Field(None, gt=0)
    """Width of the MLP; unset: from `size`. Multiples of 64 are fastest on a GPU; the published
    5461 of size 1b is not one, and 5504 is the next."""
    num_layers: int | None = Field(None, gt=0, le=10_000)
    """Number of blocks, at most 10 000; unset: from `size`."""
    num_heads: int | None = Field(None, gt=0)
    """Number of query heads; unset: from `size`."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Number of key and value heads (grouped-query attention), a divisor of num_heads; unset:
    num_heads."""
    vocab_size: int = Field(32100, gt=0)
    """Number of token ids of the embedding and the head; at least the tokenizer's."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary embedding's frequencies."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal distribution that initializes embedding, linear layers and
    head."""
    attention: Literal["sdpa", "flex", "flash_attn"] = "sdpa"
    """Attention backend. sdpa and flash_attn are causal over the packed sequence; flex attends only
    within each document."""

    @model_validator(mode="after")
    def _check_divisibility(self) -> Self:
        dims = self.dimensions()
        if dims.hidden_size % dims.num_heads:
            raise ValueError(
                f"hidden_size = {dims.hidden_size} is not a multiple of "
                f"num_heads = {dims.num_heads}; choose num_heads among the divisors of hidden_size"
            )
        if dims.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {dims.head_dim} is odd, but rotary embeddings rotate "
                "pairs of features; choose hidden_size as a multiple of 2 * num_heads"
            )
        if dims.num_heads % dims.num_kv_heads:
            raise ValueError(
                f"num_heads = {dims.num_heads} is not a multiple of "
                f"num_kv_heads = {dims.num_kv_heads}; choose num_kv_heads among the divisors of "
                "num_heads"
            )
        return self

    def dimensions(self) -> LlamaDimensions:
        """Returns the table's row for `size` with the overrides applied."""
        hidden_size, intermediate_size, num_layers, num_heads = SIZES[self.size]
        num_heads = self.num_heads or num_heads
        return LlamaDimensions(
            hidden_size=self.hidden_size or hidden_size,
            intermediate_size=self.intermediate_size or intermediate_size,
            num_layers=self.num_layers or num_layers,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            vocab_size=self.vocab_size,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            init_std=self.init_std,
        )

    def architecture(self) -> dict[str, object]:
        """Returns all keys but the attention backend, which has no weights."""
        return self.model_dump(mode="json", exclude={"attention"})

    def huggingface_config(self, seq_len: int) -> dict[str, object]:
        """Returns the config.json of transformers' LlamaForCausalLM."""
        dims = self.dimensions()
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
            # Both spellings: transformers 4 and 5.
            "rope_theta": dims.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": dims.rope_theta},
        }

    def check_huggingface_config(self, found: Mapping[str, Any]) -> list[str]:
        """Returns differences that shapes do not show: heads, norm epsilon, activation, rotary."""
        dims = self.dimensions()
        # transformers 5 writes rope_parameters; version 4 writes rope_theta and rope_scaling.
        rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
        num_heads = found["num_attention_heads"]
        compared = {
            "num_attention_heads": (num_heads, dims.num_heads),
            "num_key_value_heads": (
                found.get("num_key_value_heads") or num_heads,
                dims.num_kv_heads,
            ),
            "rms_norm_eps": (found.get("rms_norm_eps", 1e-6), dims.norm_eps),
            "hidden_act": (found.get("hidden_act", "silu"), "silu"),
            "rope_theta": (
                rope.get("rope_theta", found.get("rope_theta", 10000.0)),
                dims.rope_theta,
            ),
            "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        return [
            f"{key} = {theirs!r}, the model has {ours!r}"
            for key, (theirs, ours) in compared.items()
            if theirs != ours
        ]

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of every linear layer and the head, by qualified module name."""
        return self.dimensions().linear_shapes()

    def check_device(self, device_type: str, compute_dtype: torch.dtype = torch.bfloat16) -> None:
        """Checks that the attention backend can train on this device.

        Args:
            device_type: "cpu" or "cuda".
            compute_dtype: dtype of activations.

        Raises:
            EnvironmentMismatchError: if it cannot.
        """
        check_attention(self.attention, self.dimensions().head_dim, device_type, compute_dtype)
