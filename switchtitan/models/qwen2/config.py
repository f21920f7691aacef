"""The `[model]` section for Qwen2."""

from typing import ClassVar, Literal

from switchtitan.models.llama.config import LlamaFamilyConfig


class Qwen2Config(LlamaFamilyConfig):
    """Qwen2 and Qwen2.5 (arXiv 2407.10671): LLaMA with biases in q_proj, k_proj and v_proj."""

    huggingface_class: ClassVar[str] = "Qwen2ForCausalLM"
    huggingface_type: ClassVar[str] = "qwen2"
    huggingface_types: ClassVar[frozenset[str]] = frozenset({"qwen2"})
    biased_layers: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")

    name: Literal["qwen2"] = "qwen2"
    """Name of the model."""
