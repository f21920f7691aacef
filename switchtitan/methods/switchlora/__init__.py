"""SwitchLoRA (arXiv 2406.06564).

`plan` decides which vectors are switched, `candidates` has their replacements, `optimizer`
exchanges them, and `factors` updates what is not frozen. `method` puts these into a model.
"""

from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.method import SwitchLora

__all__ = ["SwitchLora", "SwitchLoraConfig"]
