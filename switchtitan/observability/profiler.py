"""The `[profiler]` section, and traces for TensorBoard's profile plugin and Perfetto."""

import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import profiler

from switchtitan.regions import observe_regions, stop_observing_regions
from switchtitan.registry import Section

logger = logging.getLogger(__name__)

_END_BYTES = 1 << 13
"""More than the longest path takes."""


class ProfilerConfig(Section):
    """Steps to trace."""

    enabled: bool = False
    """Trace some steps, once per run. Traces and a summary, `profile_summary.md`, are written next
    to TensorBoard's scalars; TensorBoard shows the summary as text and images."""

    ranks: Literal["all"] | tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Ranks to trace, counted from 0, or "all"; one file each. Memory snapshots are of them too."""

    start_step: int = Field(default=10, ge=2)
    """First step to trace, counted from 1; at least 2: the step before it warms up the profiler."""

    num_steps: int = Field(default=3, ge=1)
    """Number of steps to trace, at least 1."""

    with_stack: bool = False
    """Record the Python stack of each operation: slower traced steps and a larger trace."""

    record_shapes: bool = False
    """Record the shapes of each operation's inputs."""

    memory: bool = False
    """Record allocations, for a curve of memory over time in the summary: slower traced steps and a
    larger trace."""

    memory_snapshot_step: int | None = Field(default=None, ge=1)
    """Record the allocations of GPU memory from the start of the process, with their stacks, and
    write a snapshot to `<output_dir>/memory` after this step, on `ranks`. If memory runs out, every
    rank that lacks it writes one, with the history if this key is set. Does not need `enabled`;
    requires a GPU."""

    def traces(self, rank: int) -> bool:
        """Returns whether to trace a rank."""
        return self.enabled and self.observes(rank)

    def observes(self, rank: int) -> bool:
        """Returns whether a rank is one of `ranks`."""
        return self.ranks == "all" or rank in self.ranks


class Profiler:
    """A context in which `step` is called after each optimizer step. Only traced steps cost time.

    Args:
        folder: folder of the trace, `<output_dir>/tensorboard`.
        rank: this rank.
        steps_done: steps done before this run.
        on_end: called on every rank, also on those without a trace, when tracing has ended without
            an error; with the trace and the names of its regions. May be collective.
    """

    def __init__(
        self,
        config: ProfilerConfig,
        folder: Path,
        *,
        rank: int = 0,
        steps_done: int = 0,
        on_end: Callable[[Path | None, Collection[str]], None] | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._rank = rank
        self._steps_done = steps_done
        self._on_end = on_end
        self._profile: profiler.profile | None = None
        self._trace: Path | None = None
        self._regions = _TraceRegions()
        self._is_ahead = config.enabled and steps_done <= config.start_step - 2
        self._is_running = False

    @property
    def trace(self) -> Path | None:
        """The trace file; None before it is written."""
        return self._trace

    def __enter__(self) -> "Profiler":
        self._start_if_due()
        return self

    def step(self) -> None:
        """Counts one optimizer step; all ranks must call."""
        self._steps_done += 1
        if self._profile is not None:
            self._profile.step()
        if self._steps_done >= self._config.start_step + self._config.num_steps - 1:
            self._end()
        self._start_if_due()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._end()
        else:
            # Other ranks may be elsewhere.
            self._stop()
        if self._is_ahead and error is None and self._config.traces(self._rank):
            logger.warning(
                "no trace was written: [profiler] start_step = %d, but training ended after %d "
                "steps",
                self._config.start_step,
                self._steps_done,
            )

    def _start_if_due(self) -> None:
        if not self._is_ahead or self._steps_done != self._config.start_step - 2:
            return
        self._is_ahead = False
        self._is_running = True
        if not self._config.traces(self._rank):
            return
        # Otherwise Kineto prints two lines at each start and stop, into the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        self._profile = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(wait=0, warmup=1, active=self._config.num_steps, repeat=1),
            on_trace_ready=self._write_trace,
            record_shapes=self._config.record_shapes,
            profile_memory=self._config.memory,
            with_stack=self._config.with_stack,
        )
        self._profile.start()
        observe_regions(self._regions)

    def _end(self) -> None:
        if self._is_running:
            self._is_running = False
            self._stop()
            if self._on_end is not None:
                self._on_end(self._trace, self._regions.names)

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            stop_observing_regions(self._regions)
            profile.stop()

    def _write_trace(self, profile: profiler.profile) -> None:
        """Writes the trace; logs a warning if that fails, for example on a full disk."""
        # The file name that the profile plugin expects, as of tensorboard_trace_handler.
        path = self._folder / f"rank{self._rank}.{time.time_ns()}.pt.trace.json"
        unfinished = path.with_name(f".{path.name}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(unfinished))
            if not _is_complete(unfinished):  # Kineto reports no error
                raise OSError("the profiler could not write the file; is the disk full?")
            unfinished.rename(path)
        except OSError as error:
            logger.warning("no trace was written to %s: %s", self._folder, error)
            for left in (unfinished, unfinished.with_name(f"{unfinished.name}.tmp")):
                with suppress(OSError):
                    left.unlink()
            return
        self._trace = path
        logger.info("wrote a trace of %d steps to %s", self._config.num_steps, path)


def _is_complete(trace: Path) -> bool:
    """Whether a trace has its end, which is the name that it was written to."""
    try:
        with trace.open("rb") as file:
            file.seek(max(0, trace.stat().st_size - _END_BYTES))
            end = file.read()
    except FileNotFoundError:
        return False
    return b'"traceName"' in end and end.rstrip().endswith(b"}")


class _TraceRegions:
    """Records regions in the trace."""

    def __init__(self) -> None:
        self._open: list[profiler.record_function] = []
        self.names: set[str] = set()

    def begin(self, name: str) -> None:
        self.names.add(name)
        annotation = profiler.record_function(name)
        annotation.__enter__()
        self._open.append(annotation)

    def end(self) -> None:
        self._open.pop().__exit__(None, None, None)
