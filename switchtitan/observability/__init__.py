"""User-visible output of a run: log lines, progress bar, TensorBoard, speed, memory, traces."""

from switchtitan.observability.config import MetricsConfig
from switchtitan.observability.log import configure_logging
from switchtitan.observability.metrics import (
    COUNTED_STEP,
    RESULTS_FILE,
    TENSORBOARD_FOLDER,
    Reporter,
)
from switchtitan.observability.profiler import Profiler, ProfilerConfig
from switchtitan.observability.throughput import Throughput, peak_flops_per_s, peak_memory_gib

__all__ = [
    "COUNTED_STEP",
    "RESULTS_FILE",
    "TENSORBOARD_FOLDER",
    "MetricsConfig",
    "Profiler",
    "ProfilerConfig",
    "Reporter",
    "Throughput",
    "configure_logging",
    "peak_flops_per_s",
    "peak_memory_gib",
]
