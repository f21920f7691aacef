"""The `[profiler]` section, and traces for TensorBoard's profile plugin and Perfetto."""

import logging
import os
import time
from pathlib import Path
from types import TracebackType

import torch
from pydantic import Field
from torch import profiler

from switchtitan.config.section import Section
from switchtitan.regions import observe_regions, stop_observing_regions

logger = logging.getLogger(__name__)


class ProfilerConfig(Section):
    """Steps to trace."""

    enabled: bool = False
    """Trace some steps of the main rank, once per run; written next to TensorBoard's scalars."""

    start_step: int = Field(default=10, ge=2)
    """First step to trace, counted from 1; at least 2: the step before it warms up the profiler."""

    num_steps: int = Field(default=3, ge=1)
    """Number of steps to trace, at least 1."""

    with_stack: bool = False
    """Record the Python stack of each operation: slower traced steps and a larger trace."""

    record_shapes: bool = False
    """Record the shapes of each operation's inputs."""


class Profiler:
    """A context in which `step` is called after each optimizer step. Only traced steps cost time.

    Args:
        folder: folder of the trace, `<output_dir>/tensorboard`.
        worker: this rank's name in the trace's file name; None for a rank without a trace.
        steps_done: steps done before this run.
    """

    def __init__(
        self, config: ProfilerConfig, folder: Path, *, worker: str | None, steps_done: int = 0
    ) -> None:
        self._config = config
        self._folder = folder
        self._worker = worker if config.enabled else None
        self._steps_done = steps_done
        self._profile: profiler.profile | None = None
        self._trace: Path | None = None
        self._regions = _TraceRegions()
        self._is_ahead = self._worker is not None and steps_done <= config.start_step - 2

    @property
    def trace(self) -> Path | None:
        """The trace file; None before it is written."""
        return self._trace

    def __enter__(self) -> "Profiler":
        self._start_if_due()
        return self

    def step(self) -> None:
        """Counts one optimizer step."""
        self._steps_done += 1
        if self._profile is not None:
            self._profile.step()
            if self._trace is not None:
                self._stop()
        self._start_if_due()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._stop()
        if self._is_ahead and error is None:
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
            with_stack=self._config.with_stack,
        )
        self._profile.start()
        observe_regions(self._regions)

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        stop_observing_regions(self._regions)
        profile.stop()

    def _write_trace(self, profile: profiler.profile) -> None:
        # The file name that the profile plugin expects, as of tensorboard_trace_handler.
        path = self._folder / f"{self._worker}.{time.time_ns()}.pt.trace.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.partial")
        profile.export_chrome_trace(str(unfinished))
        unfinished.rename(path)
        self._trace = path
        logger.info("wrote a trace of %d steps to %s", self._config.num_steps, path)


class _TraceRegions:
    """Records regions in the trace."""

    def __init__(self) -> None:
        self._open: list[profiler.record_function] = []

    def begin(self, name: str) -> None:
        annotation = profiler.record_function(name)
        annotation.__enter__()
        self._open.append(annotation)

    def end(self) -> None:
        self._open.pop().__exit__(None, None, None)
