"""ReLoRA (arXiv 2307.05695): when and what to reset (`reset`), and the optimizer that does (`method`)."""

from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.method import Relora

__all__ = ["Relora", "ReloraConfig"]
