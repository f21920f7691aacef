"""Snapshots of GPU memory: after a step on request, and when memory runs out."""

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

import torch

logger = logging.getLogger(__name__)

SNAPSHOTS_FOLDER = "memory"
"""Folder of snapshots in a run's output folder."""
MAX_EVENTS = 100_000
"""Allocations and frees that the history keeps, the latest ones; each holds a stack."""


class MemorySnapshots:
    """A context that writes a snapshot of GPU memory if it runs out inside; and a hook.

    As a `training.hooks.Hook` it writes one after a step. On a CPU it does nothing.

    Args:
        output_dir: of the run; snapshots go to its folder `SNAPSHOTS_FOLDER`.
        step: after which to write a snapshot; the history of allocations is recorded from the start
            of the context to there. None: a snapshot of memory that ran out has no history.
        is_asked_for: whether this rank writes the one after `step`.
    """

    def __init__(
        self,
        output_dir: Path,
        rank: int,
        device: torch.device,
        step: int | None = None,
        is_asked_for: bool = True,
    ) -> None:
        self._folder = output_dir / SNAPSHOTS_FOLDER
        self._rank = rank
        self._is_on_gpu = device.type == "cuda"
        self._step = step
        self._is_asked_for = is_asked_for
        self._is_recording = False

    def __enter__(self) -> "MemorySnapshots":
        if self._is_on_gpu and self._step is not None:
            torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
            self._is_recording = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._is_on_gpu:
            return
        if isinstance(error, torch.OutOfMemoryError):
            self._write("out-of-memory")
        self._stop_recording()

    def around(self, step: int) -> AbstractContextManager[None]:
        """Ends the recording if the run resumed after the step. See `training.hooks.Hook`."""
        if self._is_recording and self._step is not None and step > self._step:
            logger.warning("no snapshot of GPU memory: this run started after step %d", self._step)
            self._stop_recording()
        return nullcontext()

    def is_due(self, step: int) -> bool:
        """See `training.hooks.Hook`."""
        return step == self._step

    def after(self, step: int) -> None:
        """Writes the requested snapshot, and ends the recording, which slows down allocations."""
        if self._is_on_gpu:
            if self._is_asked_for:
                self._write(f"step-{step:09d}")
            self._stop_recording()

    def results(self) -> dict[str, float | None]:
        """See `training.hooks.Hook`."""
        return {}

    def _stop_recording(self) -> None:
        if self._is_recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._is_recording = False

    def _write(self, moment: str) -> None:
        """Writes a snapshot; an error of the disk must not hide that memory ran out."""
        file = self._folder / f"rank{self._rank}-{moment}.pickle"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(file))
        except OSError as error:
            logger.warning("could not write a snapshot of GPU memory to %s (%s)", file, error)
            return
        logger.warning("wrote a snapshot of GPU memory to %s", file)
