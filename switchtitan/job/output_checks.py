"""Checks of what a run reports: metrics, traces and snapshots of memory."""

from collections.abc import Sequence
from importlib.util import find_spec

from switchtitan.config.section import VoidKey
from switchtitan.job.sections import TrainingConfig
from switchtitan.observability import COUNTED_STEP, MetricsConfig, ProfilerConfig


def check_communication(
    metrics: MetricsConfig, training: TrainingConfig, num_ranks: int
) -> list[str | VoidKey]:
    """Counting communication needs several ranks, and the step that is counted."""
    if not metrics.communication:
        return []
    key = "[metrics] communication = true has no effect"
    if num_ranks == 1:
        return [f"{key}: one rank sends nothing; remove it, or start several ranks"]
    if training.steps < COUNTED_STEP:
        problem = (
            f"{key}: the bytes of step {COUNTED_STEP} are counted, and [training] steps = "
            f"{training.steps}; remove it, or train longer"
        )
        return [VoidKey("metrics.communication", ("training.steps",), problem)]
    return []


def check_trackers(metrics: MetricsConfig) -> list[str]:
    """A tracker needs its package."""
    return [
        f"[metrics] trackers: {tracker} needs the package {tracker}; run pip install "
        f"'switchtitan[{tracker}]', or remove it from trackers"
        for tracker in metrics.trackers
        if not _is_installed(tracker)
    ]


def check_profiler(profiler: ProfilerConfig, num_ranks: int) -> Sequence[str | VoidKey]:
    """The ranks to trace must exist, and what to trace needs a trace."""
    used = {"memory": profiler.enabled}
    used["ranks"] = profiler.enabled or profiler.memory_snapshot_step is not None
    void = [
        VoidKey(
            f"profiler.{key}",
            ("profiler.enabled", "profiler.memory_snapshot_step"),
            f"[profiler] {key} has no effect without enabled = true; remove it, or set enabled",
        )
        for key, is_used in used.items()
        if not is_used and getattr(profiler, key) not in (False, (0,))
    ]
    if void or profiler.ranks == "all":
        return void
    if not profiler.ranks:
        return ["[profiler] ranks = []: traces nothing; name a rank, or set enabled = false"]
    return [
        f"[profiler] ranks: there is no rank {rank}; expected ranks from 0 to {num_ranks - 1}"
        for rank in profiler.ranks
        if rank >= num_ranks
    ]


def check_memory_snapshot(
    profiler: ProfilerConfig, training: TrainingConfig, device: str
) -> list[str | VoidKey]:
    """A snapshot of GPU memory needs a GPU, and a step of the run."""
    step = profiler.memory_snapshot_step
    if step is None:
        return []
    key = f"[profiler] memory_snapshot_step = {step} has no effect"
    if device != "cuda":
        return [f"{key} without a GPU: only torch's GPU memory has a history; remove it"]
    if step > training.steps:
        problem = f"{key}: [training] steps = {training.steps}; lower it, or remove it"
        return [VoidKey("profiler.memory_snapshot_step", ("training.steps",), problem)]
    return []


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    # A folder of this name in the working directory has no origin: wandb writes one.
    return spec is not None and spec.origin is not None
