"""Traces of steps for Perfetto and TensorBoard, and snapshots of GPU memory."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import profiler

from switchtitan import regions
from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.config import ProfilerConfig

logger = logging.getLogger(__name__)

_TABLE_ROWS = 25
_TRACE_SUFFIX = ".pt.trace.json"
MAX_EVENTS = 100_000
"""Allocations and frees that the history keeps, the latest ones; each holds a stack."""


@dataclass(eq=False)
class Profiler:
    """A context in which `step` is called after each optimizer step: traces some, as configured."""

    config: ProfilerConfig
    output_dir: Path
    rank: int = 0
    steps_done: int = 0
    """Steps of the run so far. If a run begins past the first step to trace, later ones are traced,
    unless it has a trace."""

    def __post_init__(self) -> None:
        config = self.config
        self._is_observed = config.ranks == "all" or self.rank in config.ranks
        self._profile: profiler.profile | None = None
        self._first_step = max(config.start_step, self.steps_done + 2)
        self._last_step = self._first_step + config.num_steps - 1
        self._snapshot_step = None
        if config.memory_snapshot_step is not None and torch.cuda.is_available():
            # A resumed run may be past it.
            self._snapshot_step = max(config.memory_snapshot_step, self.steps_done + 1)
        self.trace: Path | None = None
        """The trace file; None before it is written."""

    def __enter__(self) -> "Profiler":
        config, folder = self.config, self.output_dir / TENSORBOARD_FOLDER
        if not (config.enabled and self._is_observed):
            return self
        is_past = config.start_step < self._first_step
        if is_past and any(folder.glob(f"rank{self.rank}.*{_TRACE_SUFFIX}")):
            more = f"for another, set [profiler] start_step = {self._first_step} or more"
            logger.info("no new trace: %s has one; %s", folder, more)
            return self
        # Otherwise Kineto prints two lines at each start and stop, into the progress bar.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        idle = self._first_step - 2 - self.steps_done
        self._profile = profiler.profile(
            schedule=profiler.schedule(wait=idle, warmup=1, active=config.num_steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=config.record_shapes,
            profile_memory=config.memory,
            with_stack=config.with_stack,
        )
        self._profile.start()
        regions.observers.append(profiler.record_function)
        return self

    @property
    def is_slow_next(self) -> bool:
        """Whether the next `step` starts or writes a trace, or writes a snapshot, on some rank."""
        slow = {self._snapshot_step}
        if self.config.enabled:
            slow |= {self._first_step - 2, self._first_step - 1, self._last_step}
        return self.steps_done + 1 in slow

    def step(self) -> None:
        """Counts one optimizer step."""
        self.steps_done += 1
        if self._profile is not None:
            self._profile.step()
            if self.steps_done >= self._last_step:
                self._stop()
        if self.steps_done == self._snapshot_step:
            if self._is_observed:
                _write_snapshot(self.output_dir, self.rank, f"step-{self.steps_done:09d}")
            # Recording slows down allocations.
            torch.cuda.memory._record_memory_history(enabled=None)

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            regions.observers.remove(profiler.record_function)
            profile.stop()

    def _write(self, profile: profiler.profile) -> None:
        """Writes the trace; logs a warning if that fails, for example on a full disk."""
        folder = self.output_dir / TENSORBOARD_FOLDER
        sort_by = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        table = profile.key_averages().table(sort_by, row_limit=_TABLE_ROWS)
        # As tensorboard_trace_handler names it.
        path = folder / f"rank{self.rank}.{time.time_ns()}{_TRACE_SUFFIX}"
        unfinished = path.with_name(f".{path.name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(unfinished))
            # Kineto reports no error. A trace ends with the name that it was written to.
            if b'"traceName"' not in unfinished.read_bytes()[-(1 << 13) :]:
                raise OSError("the profiler could not write the file; is the disk full?")
            path.with_suffix(".txt").write_text(table, encoding="utf-8")
            unfinished.rename(path)
        except OSError as error:
            logger.warning("no trace was written to %s: %s", folder, error)
            for left in folder.glob(f"{unfinished.name}*"):
                left.unlink()
            return
        self.trace = path
        logger.info("wrote a trace to %s, and its table of operations as .txt", path)


@contextmanager
def snapshot_if_memory_runs_out(
    config: ProfilerConfig, output_dir: Path, rank: int
) -> Iterator[None]:
    """Returns a context that writes a snapshot of GPU memory if it runs out inside.

    With `memory_snapshot_step`, it has all allocations from here on, with their stacks, unless
    `Profiler` has written its snapshot.
    """
    has_history = config.memory_snapshot_step is not None and torch.cuda.is_available()
    if has_history:
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    try:
        yield
    except torch.OutOfMemoryError:
        _write_snapshot(output_dir, rank, "out-of-memory")
        raise
    finally:
        if has_history:
            torch.cuda.memory._record_memory_history(enabled=None)


def _write_snapshot(output_dir: Path, rank: int, moment: str) -> None:
    """Writes a snapshot; an error of the disk must not hide that memory ran out."""
    file = output_dir / "memory" / f"rank{rank}-{moment}.pickle"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(file))
    except OSError as error:
        logger.warning("could not write a snapshot of GPU memory to %s (%s)", file, error)
    else:
        logger.warning("wrote a snapshot of GPU memory to %s", file)
