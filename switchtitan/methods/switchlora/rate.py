"""How the switching frequency changes during a run."""

from typing import Literal

import numpy as np

Decay = Literal["exponential", "sigmoid", "constant"]


def switch_rate(decay: Decay, decay_ratio: float, num_steps: int) -> np.ndarray:
    """Returns the factor on the switching frequency at every step, [num_steps].

    "exponential": 0.3^((t+1) / (decay_ratio T))
    "sigmoid": 1 - 1/(1 + exp(-10 (t / (decay_ratio T) - 1)))
    "constant": 1
    """
    t = np.arange(num_steps, dtype=np.float64)
    horizon = decay_ratio * num_steps
    if decay == "exponential":
        return 0.3 ** ((t + 1) / horizon)
    if decay == "sigmoid":
        return 1 - 1 / (1 + np.exp(-10 * (t / horizon - 1)))
    return np.ones(num_steps)
