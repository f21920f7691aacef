"""The sections `[metrics]` and `[profiler]`."""

from typing import Annotated, Literal

from pydantic import Field

from switchtitan.registry import Section


class MetricsConfig(Section):
    """Metrics to report, how often and where."""

    interval: int = Field(default=10, ge=1)
    """Optimizer steps between two reports, at least 1. A report makes the host wait for the
    device."""
    tensorboard: bool = True
    """Write scalars to `<output_dir>/tensorboard`."""
    trackers: tuple[Literal["wandb"], ...] = ()
    """Experiment trackers that the scalars are also sent to: Weights & Biases. Its package is an
    extra, `pip install '.[wandb]'`; its variables apply, e.g. `WANDB_MODE=offline`."""
    progress_bar: bool = True
    """Draw a progress bar if standard error is a terminal."""


class ProfilerConfig(Section):
    """Steps to trace."""

    enabled: bool = False
    """Trace some steps, once per run. Traces are written next to TensorBoard's scalars, each with
    a table of its operations."""
    ranks: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Ranks to trace, counted from 0, or "all"; one file each. Memory snapshots are of them too."""
    start_step: int = Field(default=10, ge=2)
    """First step to trace, counted from 1; at least 2: the step before it warms up the profiler. A
    run that resumes past it without a trace starts with the second step after the resume."""
    num_steps: int = Field(default=3, ge=1)
    """Number of steps to trace, at least 1."""
    with_stack: bool = False
    """Record the Python stack of each operation: slower traced steps and a larger trace."""
    record_shapes: bool = False
    """Record the shapes of each operation's inputs."""
    memory: bool = False
    """Record allocations in the trace: slower traced steps and a larger trace."""
    memory_snapshot_step: int | None = Field(default=None, ge=1)
    """Record allocations of GPU memory from the start, with their stacks, and write a snapshot to
    `<output_dir>/memory` after this step, on `ranks`. A rank that runs out of memory writes one in
    any case, with the history if this key is set. Does not need `enabled`; requires a GPU."""
