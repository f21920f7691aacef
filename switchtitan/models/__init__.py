"""Models by name. To add one, add a file or a folder here and a row in `MODELS`."""

import torch

from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.models.cola import Cola, ColaConfig
from switchtitan.models.llama.config import LlamaConfig, Qwen2Config
from switchtitan.models.llama.model import Llama
from switchtitan.registry import Component, Registry

MODELS: Registry[ModelConfig, LanguageModel] = Registry(
    "model",
    {
        "cola": Component(ColaConfig, Cola),
        "llama": Component(LlamaConfig, Llama),
        "qwen2": Component(Qwen2Config, Llama),
    },
)
"""`plain_model` builds them."""


def plain_model(config: ModelConfig) -> LanguageModel:
    """Returns the model of a section, on the meta device, before a method changes it."""
    with torch.device("meta"):
        return MODELS.build(config)
