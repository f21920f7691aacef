"""What a training step costs: times of several configurations side by side, and bytes sent between ranks."""

from switchtitan.benchmark.communication import communication_of_a_step
from switchtitan.benchmark.side_by_side import time_steps_side_by_side
from switchtitan.benchmark.step_times import Ratio, StepTimes, ratio_of_steps

__all__ = [
    "Ratio",
    "StepTimes",
    "communication_of_a_step",
    "ratio_of_steps",
    "time_steps_side_by_side",
]
