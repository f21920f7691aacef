"""Models by name. To add one, add a file or a folder here and a row in `MODELS`."""

import torch
from torch import nn

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


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of every linear layer of the plain model, by qualified name, in order."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in plain_model(config.on_any_machine()).named_modules()
        if isinstance(module, nn.Linear)
    }
