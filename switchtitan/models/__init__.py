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
"""Build models under `torch.device("meta")`."""


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of every linear layer of the plain model, by qualified name, in order."""
    with torch.device("meta"):
        model = MODELS.build(config.on_any_machine())
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
