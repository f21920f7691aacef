"""The `[model]` sections of LLaMA and its family: the table of sizes, and the keys of all."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn
from typing_extensions import Self

from switchtitan.contracts import ModelConfig
from switchtitan.errors import ConfigError
from switchtitan.models.llama.attention import check_attention
from switchtitan.models.llama.huggingface import SCALING_KEYS, read_config, write_config
from switchtitan.registry import explain


class Sizes(NamedTuple):
    """A row of the table of sizes."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int


SIZES = {
    "9m": Sizes(128, 352, 4, 4),
    "20m": Sizes(256, 688, 4, 4),
    "35m": Sizes(384, 1024, 6, 8),
    "60m": Sizes(512, 1376, 8, 8),
    "130m": Sizes(768, 2048, 12, 12),
    "250m": Sizes(768, 2560, 24, 16),
    "350m": Sizes(1024, 2736, 24, 16),
    "1b": Sizes(2048, 5461, 24, 32),
    "3b": Sizes(2560, 6848, 32, 32),
    "7b": Sizes(4096, 11008, 32, 32),
}
"""The published runs (arXiv 2406.06564)."""
MAX_WIDTH, MAX_HEADS = 1 << 24, 1 << 12
"""Limits of sizes in foreign files, so that a matrix's bytes are a 64-bit number."""


class LlamaFamilyConfig(ModelConfig):
    """The keys of LLaMA and of models that differ from it in `name` and the class variables."""

    huggingface_class: ClassVar[str | None] = None
    """The class of transformers that loads an exported model, if there is one."""
    biased_layers: ClassVar[tuple[str, ...]] = ()
    """Local names of the linear layers with a bias."""

    size: Literal["9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "3b", "7b"] | None = None
    """Sets hidden_size (in this order 128, 256, 384, 512, 768, 768, 1024, 2048, 2560 and 4096),
    intermediate_size, num_layers and num_heads; unset: set these four."""
    hidden_size: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Width of the residual stream; unset: from `size`. A multiple of 2 * num_heads unless
    head_dim is set."""
    intermediate_size: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Width of the MLP; unset: from `size`. Multiples of 64 are fastest on a GPU; the published
    5461 of size 1b is not one, and 5504 is the next."""
    num_layers: int | None = Field(None, gt=0, le=10_000)
    """Number of blocks, at most 10 000; unset: from `size`."""
    num_heads: int | None = Field(None, gt=0, le=MAX_HEADS)
    """Number of query heads; unset: from `size`."""
    num_kv_heads: int | None = Field(None, gt=0, le=MAX_HEADS)
    """Number of key and value heads (grouped-query attention), a divisor of num_heads; unset:
    num_heads."""
    head_dim: int | None = Field(None, gt=0, le=MAX_HEADS, multiple_of=2)
    """Width of one attention head, even; unset: hidden_size / num_heads."""
    vocab_size: int = Field(32100, gt=0, le=MAX_WIDTH)
    """Number of token ids of the embedding and the head; at least the tokenizer's."""
    tied_head: bool = False
    """Whether the head's weight is the embedding's. A tied head cannot be in [method] targets."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary embedding's frequencies."""
    rope_type: Literal["default", "linear", "llama3"] = "default"
    """Scaling of the rotary embedding's frequencies. "linear" divides all by rope_factor; "llama3"
    divides only those of long waves, as LLaMA 3.1 does."""
    rope_factor: float | None = Field(None, gt=0)
    """What frequencies are divided by; only with rope_type = "linear" or "llama3"."""
    rope_low_freq_factor: float | None = Field(None, gt=0)
    """Frequencies of at most so many turns within rope_original_positions are divided; only with
    rope_type = "llama3"."""
    rope_high_freq_factor: float | None = Field(None, gt=0)
    """Frequencies of at least so many turns are kept, above rope_low_freq_factor; only with
    rope_type = "llama3"."""
    rope_original_positions: int | None = Field(None, gt=0, lt=1 << 31)
    """Tokens in a sequence before the scaling; only with rope_type = "llama3"."""
    max_positions: int | None = Field(None, gt=0, lt=1 << 31)
    """Tokens in the longest sequence that an exported model is made for, if that is more than
    [data] seq_len; has no other effect."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal distribution that initializes embedding, linear layers and
    head."""
    tuned_hidden_size: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Hidden size for which init_std was chosen. With hidden_size n, linear layers in blocks then
    start with init_std (tuned_hidden_size / n)^(1/2), and the head with init_std tuned_hidden_size
    / n, so that wider models change as fast in a step; see the key of the same name in [optimizer].
    Unset: init_std at every width."""
    attention: Literal["sdpa", "flex", "flash_attn"] = "sdpa"
    """Attention backend. sdpa and flash_attn are causal over the packed sequence; flex attends only
    within each document."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        missing = [key for key in Sizes._fields if getattr(self, key) is None]
        if self.size is None and missing:
            raise ValueError(
                f"size is missing; set one of {', '.join(SIZES)}, or set {', '.join(missing)}"
            )
        hidden_size, _, _, num_heads = self.sizes
        if self.head_dim is None and hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size = {hidden_size}, num_heads = {num_heads}: expected a multiple of "
                "2 * num_heads, so that heads have an even width; change one, or set head_dim"
            )
        if num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {num_heads} is not a multiple of num_kv_heads = {self.kv_heads}; "
                "choose num_kv_heads among the divisors of num_heads"
            )
        return self

    @model_validator(mode="after")
    def _check_rope(self) -> Self:
        needed = SCALING_KEYS[self.rope_type]
        for name in SCALING_KEYS["llama3"]:
            value, remedy = getattr(self, f"rope_{name}"), "set" if name in needed else "remove"
            if (value is None) == (name in needed):
                raise ValueError(
                    f"rope_{name} = {value} with rope_type = {self.rope_type!r}: {remedy} it"
                )
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(
                f"rope_high_freq_factor = {high}: expected more than rope_low_freq_factor = {low}"
            )
        return self

    @property
    def sizes(self) -> Sizes:
        """The row of `size` with the keys that are set."""
        row = SIZES[self.size] if self.size else Sizes(0, 0, 0, 0)
        return row._replace(**{key: value for key in row._fields if (value := getattr(self, key))})

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.sizes.num_heads

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.sizes.hidden_size // self.sizes.num_heads

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.sizes.num_heads * self.head_width

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; equals that of all value heads."""
        return self.kv_heads * self.head_width

    def build_linear(self, name: str, in_features: int, out_features: int) -> nn.Module:
        """Returns a linear layer of a block, by its local name."""
        return nn.Linear(in_features, out_features, bias=name in self.biased_layers)

    def without_effect(self) -> list[str]:
        if self.size is None or any(getattr(self, key) is None for key in Sizes._fields):
            return []
        return [f"size = {self.size!r} has no effect with {', '.join(Sizes._fields)}"]

    def architecture(self) -> dict[str, object]:
        """Equal models are equal, however their keys were given."""
        others = {"size", "from_folder", "max_positions", "attention"}
        others |= {"init_std", "tuned_hidden_size"}
        return {
            **self.model_dump(mode="json", exclude=others),
            **self.sizes._asdict(),
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_width,
        }

    @classmethod
    def keys_from_huggingface(cls, found: Mapping[str, Any]) -> dict[str, object]:
        keys, problems = read_config(found)
        try:
            config = cls.model_validate(keys, strict=True)
        except ValidationError as error:
            problems.append(explain(error))
        if problems:
            raise ConfigError("; ".join(problems))
        # Defaults too, such as of the rotary embedding, so that no key of a base remains.
        resolved = {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
        return {**config.architecture(), **keys, **resolved, "size": None}

    def huggingface_config(self, seq_len: int) -> dict[str, object] | None:
        if self.huggingface_class is None:
            return None
        max_positions = max(seq_len, self.max_positions or 0)
        keys = {"init_std": self.init_std, "max_positions": max_positions, **self.architecture()}
        written = write_config(keys)
        written |= {"architectures": [self.huggingface_class], "model_type": self.name}
        if self.name == "llama" and self.sizes.hidden_size % self.sizes.num_heads:
            # transformers' LLaMA refuses such sizes, and its Mistral is the same model.
            written |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            written["sliding_window"] = None
        return written

    def weight_copies(self) -> dict[str, str]:
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied_head else {}

    def on_any_machine(self) -> Self:
        """Replaces flash_attn by sdpa, which attends to the same tokens."""
        is_flash = self.attention == "flash_attn"
        return self.model_copy(update={"attention": "sdpa"}) if is_flash else self

    def check_device(self, device_type: str, compute_dtype: torch.dtype) -> None:
        """Checks the attention backend."""
        check_attention(self.attention, device_type, compute_dtype)


class LlamaConfig(LlamaFamilyConfig):
    """LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases. Mistral without a
    sliding window is one too."""

    huggingface_class: ClassVar[str] = "LlamaForCausalLM"
    huggingface_types: ClassVar[frozenset[str]] = frozenset({"llama", "mistral"})

    name: Literal["llama"] = "llama"
    """Name of the model."""


class Qwen2Config(LlamaFamilyConfig):
    """Qwen2 and Qwen2.5 (arXiv 2407.10671): LLaMA with biases in q_proj, k_proj and v_proj."""

    huggingface_class: ClassVar[str] = "Qwen2ForCausalLM"
    huggingface_types: ClassVar[frozenset[str]] = frozenset({"qwen2"})
    biased_layers: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    name: Literal["qwen2"] = "qwen2"
    """Name of the model."""
