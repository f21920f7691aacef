"""SwitchLoRA (arXiv 2406.06564).

`schedule` decides; `init`, `switch` and the rules that update the factors (`factor_rule`) compute;
`candidates` and `optimizer` apply.
"""

from switchtitan.methods.switchlora.config import SwitchLoraConfig
from switchtitan.methods.switchlora.method import SwitchLora

__all__ = ["SwitchLora", "SwitchLoraConfig"]
