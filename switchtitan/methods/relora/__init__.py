"""ReLoRA (arXiv 2307.05695): resets (`reset`), and the optimizer that performs them (`method`)."""

from switchtitan.methods.relora.method import Relora, ReloraConfig

__all__ = ["Relora", "ReloraConfig"]
