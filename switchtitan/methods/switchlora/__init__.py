"""SwitchLoRA (arXiv 2406.06564).

`plan` decides which vectors are switched, `candidates` has their replacements, `method` exchanges
them in a model's layers, and `update` trains what is not frozen.
"""

from switchtitan.methods.switchlora.method import SwitchLora
from switchtitan.methods.switchlora.plan import SwitchLoraConfig

__all__ = ["SwitchLora", "SwitchLoraConfig"]
