"""Write checkpoints: to a partial folder, verified, then renamed; optionally in the background."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import JsonValue
from torch import Tensor

from switchtitan.checkpoint.agreement import ignore_warning_about_single_process, run_together
from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.find import (
    check_output_folder,
    complete_deletions,
    find_checkpoint,
    prune,
)
from switchtitan.checkpoint.layout import (
    partial_folder_name,
    remove_folder,
    step_folder_name,
    sync_folder,
)
from switchtitan.checkpoint.metadata import (
    FORMAT_VERSION,
    CheckpointMetadata,
    FileRecord,
    file_record,
    read_tensors_index,
    write_metadata,
)
from switchtitan.checkpoint.staging import HostCopies, own_share
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents, check_files
from switchtitan.errors import CheckpointError, CheckpointFormatError

logger = logging.getLogger(__name__)

POLL_INTERVAL = 10
"""Calls of `Checkpointer.poll` between two in which ranks communicate."""


@dataclass(frozen=True)
class _Save:
    """A save in progress."""

    step: int
    names: frozenset[str]
    train_state: dict[str, JsonValue]
    writer: ChecksummingWriter
    started_at: float


class Checkpointer:
    """Saves a run's state to `folder` and finds the checkpoint to resume from. Every method is
    collective.

    Args:
        folder: `<output_dir>/checkpoints`, on a file system that all ranks see; created on first
            use.
        identity: the values that may not change on resume (see `check_same_run`).
        metadata: for the reader: the configuration, the corpus.
        versions: of libraries and code, by name.
        comparable_identity: converts an older checkpoint's identity to today's keys.
        is_main: whether this is rank 0, which renames, prunes and logs.
        group: all ranks, over gloo; None without torch.distributed.
        background_group: another one, since the background thread and the training loop must not
            share one.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        identity: Mapping[str, JsonValue],
        metadata: Mapping[str, JsonValue],
        is_main: bool,
        group: dist.ProcessGroup | None,
        background_group: dist.ProcessGroup | None,
        versions: Mapping[str, str] | None = None,
        comparable_identity: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
    ) -> None:
        self._folder = folder
        self._config = config
        self._identity = json.loads(json.dumps(dict(identity)))
        self._metadata = json.loads(json.dumps(dict(metadata)))
        self._versions = {"torch": torch.__version__, **(versions or {})}
        self._comparable_identity = comparable_identity
        self._is_main = is_main
        self._group = group
        self._background_group = background_group
        self._in_flight: Future[Path] | None = None
        self._latest: Path | None = None
        self._resumed: Path | None = None
        self._num_polls = 0
        self._host_copies = HostCopies()

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint that this object completed."""
        return self._latest

    @property
    def resume_point(self) -> Path | None:
        """The checkpoint to resume from if the run stopped now; None if there is none yet."""
        return self._latest or self._resumed

    def checkpoint_to_resume(self) -> Path | None:
        """Returns the checkpoint to resume from, the same on every rank; None for a new run.

        Raises:
            CheckpointError: on every rank, if it is damaged or missing, or the folder holds another
                run's checkpoints.
        """

        def find() -> Path | None:
            check_output_folder(self._folder, self._config.resume)
            return find_checkpoint(self._folder, self._config.resume)

        self._resumed = self._on_main(find)
        return self._resumed

    def save(
        self, step: int, tensors: Mapping[str, Tensor], train_state: Mapping[str, JsonValue]
    ) -> None:
        """Writes `<folder>/step-<step>`; waits for an earlier save in progress.

        With `async_save`, returns once `tensors` are copied and may change; `poll` or `finish`
        completes the save. Otherwise the checkpoint is complete on return.

        Args:
            step: optimizer steps done.
            tensors: DTensors or plain tensors by name; plain ones are the same on every rank.
            train_state: plain JSON values.

        Raises:
            CheckpointError: on every rank, if this save or the earlier one fails; older checkpoints
                are untouched.
        """
        self.finish()
        state: dict[str, JsonValue] = json.loads(json.dumps(dict(train_state)))
        num_bytes = sum(math.prod(tensor.shape) * tensor.itemsize for tensor in tensors.values())
        self._on_main(lambda: self._make_partial_folder(step, num_bytes))
        writer = ChecksummingWriter(self._folder / partial_folder_name(step))
        save = _Save(step, frozenset(tensors), state, writer, time.monotonic())
        if self._background_group is None:
            ignore_warning_about_single_process()
        own = own_share(tensors)
        if self._config.async_save:
            # Not dcp.async_save: if one rank cannot copy, the others would hang.
            staged: dict[str, Tensor] = {}
            run_together(lambda: staged.update(self._host_copies(own)), self._group)
            self._num_polls = 0
            self._in_flight = _in_background(lambda: self._complete(save, staged))
        else:
            self._latest = self._complete(save, own)

    @property
    def is_writing(self) -> bool:
        """Whether a background save of this rank is under way. Not collective."""
        return self._in_flight is not None and not self._in_flight.done()

    def poll(self) -> None:
        """Completes a background save if every rank has written it. Call it each step.

        The ranks ask each other only in every `POLL_INTERVAL`-th call, since that makes all hosts
        wait for the slowest.

        Raises:
            CheckpointError: on every rank in the same call, if the save failed.
        """
        if self._in_flight is None:
            return
        self._num_polls += 1
        if self._num_polls % POLL_INTERVAL == 0 and self._all_ranks(self._in_flight.done()):
            self.finish()

    def finish(self) -> None:
        """Waits until a background save is complete.

        Raises:
            CheckpointError: on every rank, if it failed.
        """
        if self._in_flight is None:
            return
        in_flight = self._in_flight
        try:
            self._latest = in_flight.result()
        finally:
            # Ctrl-C ends the wait, not the save.
            if in_flight.done():
                self._in_flight = None

    def _all_ranks(self, claim: bool) -> bool:
        if self._group is None:
            return claim
        num_ranks = torch.tensor(int(claim))
        dist.all_reduce(num_ranks, group=self._group)
        return num_ranks.item() == dist.get_world_size(self._group)

    def _on_main(self, function: Callable[[], Path | None]) -> Path | None:
        return run_together(lambda: function() if self._is_main else None, self._group)[0]

    def _make_partial_folder(self, step: int, num_bytes: int) -> None:
        final = self._folder / step_folder_name(step)
        partial = self._folder / partial_folder_name(step)
        self._folder.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # left by an interrupted save
            remove_folder(partial)
        complete_deletions(self._folder)
        if final.exists():
            _set_aside(final)
        free = shutil.disk_usage(self._folder).free
        if num_bytes > free:
            raise CheckpointError(
                f"cannot save step {step} to {self._folder}: needs {num_bytes / 2**30:.2f} GiB, "
                f"{free / 2**30:.2f} GiB are free; free space, or lower [checkpoint] keep_latest"
            )
        partial.mkdir()

    def _complete(self, save: _Save, tensors: Mapping[str, Tensor]) -> Path:
        """Writes, verifies and renames; every rank gets the same result or error."""
        folder = self._folder
        partial = folder / partial_folder_name(save.step)
        group = self._background_group

        def write_and_read_back() -> dict[str, FileRecord]:
            dcp.save(
                dict(tensors),
                storage_writer=save.writer,
                process_group=group,
                no_dist=group is None,
            )
            for name, record in save.writer.written.items():
                if file_record(partial / name) != record:
                    raise CheckpointError(
                        f"{partial / name} differs from what was written when read back"
                    )
            return save.writer.written

        def seal() -> None:
            if self._is_main:
                self._seal(
                    save, {name: record for files in written for name, record in files.items()}
                )

        try:
            written = run_together(write_and_read_back, group)
            run_together(seal, group)
        except CheckpointError as error:
            raise CheckpointError(
                f"cannot save step {save.step} to {folder}: {error}. Older checkpoints are "
                f"untouched; incomplete files are in {partial.name}"
            ) from error
        return folder / step_folder_name(save.step)

    def _seal(self, save: _Save, files: dict[str, FileRecord]) -> None:
        partial = self._folder / partial_folder_name(save.step)
        final = self._folder / step_folder_name(save.step)
        saved_names = read_tensors_index(partial).tensors.keys()
        if saved_names != save.names:
            raise CheckpointError(
                f"the index and the saved tensors differ in {sorted(saved_names ^ save.names)[:4]}"
            )
        metadata = CheckpointMetadata(
            format_version=FORMAT_VERSION,
            step=save.step,
            train_state=save.train_state,
            identity=self._identity,
            run={"saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._metadata},
            versions=self._versions,
            files=files,
        )
        write_metadata(partial, metadata)
        check_files(partial)
        sync_folder(partial)
        partial.rename(final)
        sync_folder(self._folder)
        logger.info(
            "saved %s (%.2f GiB in %.1f s)",
            final,
            sum(record.num_bytes for record in files.values()) / 2**30,
            time.monotonic() - save.started_at,
        )
        try:
            prune(self._folder, final, self._config.keep_latest, self._is_own_identity)
        except OSError as error:
            logger.warning("could not delete an older checkpoint: %s", error)

    def _is_own_identity(self, saved: Mapping[str, object]) -> bool:
        return self._comparable_identity(saved) == self._identity


def _in_background(function: Callable[[], Path]) -> Future[Path]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    future = thread.submit(function)
    thread.shutdown(wait=False)
    return future


def _set_aside(path: Path) -> None:
    """Renames an incomplete folder that has the name of a new checkpoint.

    Raises:
        CheckpointError: if it is complete, or has a format that this version does not read.
    """
    try:
        # As thorough as the search on resume: a checkpoint skipped there must not block a save
        # here.
        check_contents(path)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        logger.warning("renaming %s to %s, since it is not complete: %s", path, aside.name, error)
        path.rename(aside)
        return
    raise CheckpointError(f"{path} already exists and is complete; it is not overwritten")
