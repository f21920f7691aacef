"""The `[model]` section for LLaMA and its family: the table of sizes, and the keys of all."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from switchtitan.config.section import VoidKey, VoidKeyError
from switchtitan.contracts import ModelConfig
from switchtitan.errors import ConfigError
from switchtitan.models.llama.attention import check_attention
from switchtitan.models.llama.dimensions import LlamaDimensions
from switchtitan.models.llama.huggingface import differences, read_config, write_config
from switchtitan.models.llama.rope import ROPE_KEYS, Rope, RopeType

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
MAX_WIDTH = 1 << 24
"""Largest dimension of a matrix, so that the bytes of one are a 64-bit number."""
_SIZE_KEYS = ("hidden_size", "intermediate_size", "num_layers", "num_heads")


class LlamaFamilyConfig(ModelConfig):
    """The keys of LLaMA and of models that differ from it in details.

    A subclass says the details: `name` and the class variables.
    """

    huggingface_class: ClassVar[str]
    """The class of transformers that loads an exported model."""
    huggingface_type: ClassVar[str]
    """Its `model_type`."""
    biased_layers: ClassVar[tuple[str, ...]] = ()
    """Local names of the linear layers with a bias."""

    size: Literal["9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "3b", "7b"] | None = None
    """Row of the table of sizes: sets hidden_size, intermediate_size, num_layers and num_heads;
    unset: set these four."""
    hidden_size: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Width of the residual stream; unset: from `size`. A multiple of num_heads unless head_dim is
    set."""
    intermediate_size: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Width of the MLP; unset: from `size`. Multiples of 64 are fastest on a GPU; the published
    5461 of size 1b is not one, and 5504 is the next."""
    num_layers: int | None = Field(None, gt=0, le=10_000)
    """Number of blocks, at most 10 000; unset: from `size`."""
    num_heads: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Number of query heads; unset: from `size`."""
    num_kv_heads: int | None = Field(None, gt=0, le=MAX_WIDTH)
    """Number of key and value heads (grouped-query attention), a divisor of num_heads; unset:
    num_heads."""
    head_dim: int | None = Field(None, gt=0, le=MAX_WIDTH, multiple_of=2)
    """Width of one attention head, even; unset: hidden_size / num_heads."""
    vocab_size: int = Field(32100, gt=0, le=MAX_WIDTH)
    """Number of token ids of the embedding and the head; at least the tokenizer's."""
    tied_head: bool = False
    """Whether the head's weight is the embedding's. A tied head cannot be in [method] targets."""
    norm_eps: float = Field(1e-6, gt=0)
    """Added to the mean square in every RMSNorm."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary embedding's frequencies."""
    rope_type: RopeType = "default"
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
    attention: Literal["sdpa", "flex", "flash_attn"] = "sdpa"
    """Attention backend. sdpa and flash_attn are causal over the packed sequence; flex attends only
    within each document."""

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        missing = [key for key in _SIZE_KEYS if getattr(self, key) is None]
        if self.size is None and missing:
            alone = ", or from_folder alone" if self.huggingface_types else ""
            raise ValueError(
                f"size is missing; set one of {', '.join(SIZES)}, or set {', '.join(missing)}"
                f"{alone}"
            )
        dims = self.dimensions()
        if self.head_dim is None and dims.hidden_size % dims.num_heads:
            raise ValueError(
                f"hidden_size = {dims.hidden_size} is not a multiple of "
                f"num_heads = {dims.num_heads}; choose num_heads among the divisors of "
                "hidden_size, or set head_dim"
            )
        if dims.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads = {dims.head_dim} is odd, but rotary embeddings rotate "
                "pairs of features; choose hidden_size as a multiple of 2 * num_heads"
            )
        if dims.q_size > MAX_WIDTH:
            raise ValueError(
                f"num_heads * head_dim = {dims.q_size}: expected at most {MAX_WIDTH}; lower one"
            )
        if dims.num_heads % dims.num_kv_heads:
            raise ValueError(
                f"num_heads = {dims.num_heads} is not a multiple of "
                f"num_kv_heads = {dims.num_kv_heads}; choose num_kv_heads among the divisors of "
                "num_heads"
            )
        return self

    @model_validator(mode="after")
    def _check_rope(self) -> Self:
        needed = ROPE_KEYS[self.rope_type]
        for key in ROPE_KEYS["llama3"]:
            value = getattr(self, key)
            if value is None and key in needed:
                raise ValueError(f"rope_type = {self.rope_type!r} needs {key}; set it")
            if value is not None and key not in needed:
                problem = (
                    f"{key} = {value} has no effect with rope_type = {self.rope_type!r}; remove it"
                )
                raise VoidKeyError([VoidKey(key, ("rope_type",), problem)])
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(
                f"rope_high_freq_factor = {high}: expected more than rope_low_freq_factor = {low}"
            )
        return self

    def dimensions(self) -> LlamaDimensions:
        """Returns the table's row for `size` with the overrides applied."""
        row = dict(zip(_SIZE_KEYS, SIZES[self.size] if self.size else (0, 0, 0, 0), strict=True))
        sizes = {key: getattr(self, key) or row[key] for key in _SIZE_KEYS}
        rope = {key.removeprefix("rope_"): getattr(self, key) for key in ROPE_KEYS[self.rope_type]}
        return LlamaDimensions(
            **sizes,
            num_kv_heads=self.num_kv_heads or sizes["num_heads"],
            head_dim=self.head_dim or sizes["hidden_size"] // sizes["num_heads"],
            vocab_size=self.vocab_size,
            norm_eps=self.norm_eps,
            rope=Rope(self.rope_theta, self.rope_type, **rope),
            tied_head=self.tied_head,
            init_std=self.init_std,
            biased_layers=self.biased_layers,
        )

    @classmethod
    def implied_by(cls, key: str, value: object) -> Mapping[str, object]:
        """See `Section.implied_by`."""
        if key != "size" or not isinstance(value, str) or value not in SIZES:
            return {}
        return dict(zip(_SIZE_KEYS, SIZES[value], strict=True))

    def architecture(self) -> dict[str, object]:
        """Returns name and dimensions: equal models are equal, however their keys were given."""
        return {"name": self.name, **self.dimensions().architecture()}

    @classmethod
    def keys_from_huggingface(cls, found: Mapping[str, Any]) -> dict[str, object]:
        """See `contracts.ModelConfig`."""
        return {"size": None, **read_config(found)}

    def huggingface_config(self, seq_len: int) -> dict[str, object] | None:
        """Returns the config.json of transformers' class for this model."""
        return {
            "architectures": [self.huggingface_class],
            "model_type": self.huggingface_type,
            **write_config(self.dimensions(), max(seq_len, self.max_positions or 0)),
        }

    def check_huggingface_config(self, found: Mapping[str, Any]) -> list[str]:
        """Returns all differences between a config.json and this model."""
        model_type = found.get("model_type", self.huggingface_type)
        if not isinstance(model_type, str) or model_type not in self.huggingface_types:
            supported = " or ".join(map(repr, sorted(self.huggingface_types)))
            return [f"model_type = {model_type!r}, [model] name = {self.name!r} is {supported}"]
        try:
            return differences(self.keys_from_huggingface(found), self.dimensions())
        except ConfigError as error:
            return [str(error)]

    def has_tied_head(self) -> bool:
        """See `contracts.ModelConfig`."""
        return self.tied_head

    def weight_copies(self) -> dict[str, str]:
        """See `contracts.ModelConfig`."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.tied_head else {}

    def on_any_machine(self) -> Self:
        """Replaces flash_attn by sdpa, which attends to the same tokens. See
        `contracts.ModelConfig`."""
        if self.attention != "flash_attn":
            return self
        return self.model_copy(update={"attention": "sdpa"})

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns (out, in) of every linear layer and an untied head, by qualified module name."""
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


class LlamaConfig(LlamaFamilyConfig):
    """LLaMA (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases. Mistral without a
    sliding window is one too."""

    huggingface_class: ClassVar[str] = "LlamaForCausalLM"
    huggingface_type: ClassVar[str] = "llama"
    huggingface_types: ClassVar[frozenset[str]] = frozenset({"llama", "mistral"})

    name: Literal["llama"] = "llama"
    """Name of the model."""

    def huggingface_config(self, seq_len: int) -> dict[str, object] | None:
        """See `contracts.ModelConfig`."""
        written = super().huggingface_config(seq_len)
        dims = self.dimensions()
        if written is not None and dims.hidden_size % dims.num_heads:
            # transformers' LLaMA refuses such sizes, and its Mistral is the same model.
            written |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            written["sliding_window"] = None
        return written
