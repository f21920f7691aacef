"""Models by name. To add one, add a file or a folder here and a row in `MODELS`."""

from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.models.cola import ColaConfig, build_cola
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.model import build_llama
from switchtitan.models.qwen2.config import Qwen2Config
from switchtitan.registry import Component, Registry

MODELS: Registry[ModelConfig, LanguageModel] = Registry(
    "model",
    {
        "cola": Component(ColaConfig, build_cola),
        "llama": Component(LlamaConfig, build_llama),
        "qwen2": Component(Qwen2Config, build_llama),
    },
)
"""Build models under `torch.device("meta")`."""
