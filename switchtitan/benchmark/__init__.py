"""What a training step costs: times of several configurations side by side, and, without the
hardware, bytes sent between ranks, memory and arithmetic."""

from switchtitan.benchmark.estimate import StepEstimate, estimate_step
from switchtitan.benchmark.side_by_side import time_steps_side_by_side
from switchtitan.benchmark.step_communication import communication_of_a_step
from switchtitan.benchmark.step_times import Ratio, StepTimes, ratio_of_steps

__all__ = [
    "Ratio",
    "StepEstimate",
    "StepTimes",
    "communication_of_a_step",
    "estimate_step",
    "ratio_of_steps",
    "time_steps_side_by_side",
]
