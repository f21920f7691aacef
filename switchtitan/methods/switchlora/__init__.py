"""SwitchLoRA (arXiv 2406.06564): decide (`schedule`), compute (`draws`, `switch`, `freeze`, `adamw`), apply (`candidates`,
`optimizer`)."""

from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.method import SwitchLora

__all__ = ["SwitchLora", "SwitchLoraConfig"]
