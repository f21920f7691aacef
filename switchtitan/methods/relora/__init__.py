"""ReLoRA (arXiv 2307.05695): when and what to reset (`reset`), and the optimizer that does (`method`)."""

from switchtitan.methods.relora.method import Relora, ReloraConfig

__all__ = ["Relora", "ReloraConfig"]
