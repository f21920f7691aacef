"""Models by name. A new one is a folder here and a row in `MODELS`."""

from torch import nn

from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.model import build_llama
from switchtitan.registry import Component, Registry

MODELS: Registry[nn.Module] = Registry("model", {"llama": Component(LlamaConfig, build_llama)})
"""Rows fulfil `contracts.LanguageModel`; build them under `torch.device("meta")`."""
