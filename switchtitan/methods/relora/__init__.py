"""ReLoRA (arXiv 2307.05695): decide (`schedule`), compute (`reset`), apply (`optimizer`)."""

from switchtitan.methods.relora.config import ReloraConfig
from switchtitan.methods.relora.method import Relora

__all__ = ["Relora", "ReloraConfig"]
