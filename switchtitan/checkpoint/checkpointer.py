"""Save a run's checkpoints, optionally in the background, and delete old ones.

A save writes a partial folder: every file is flushed to disk and hashed, then the folder is
renamed. So a folder named step-N is complete, whenever the process or the power fails.
"""

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.find import (
    FORMAT_VERSION,
    METADATA_FILE,
    SUMS_FILE,
    CheckpointMetadata,
    find_checkpoint,
    is_complete,
    is_own_file,
    list_step_folders,
    read_metadata,
    step_folder_name,
    sums_text,
)
from switchtitan.checkpoint.tensors import HostMemory, as_checkpoint_error, write_tensors
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError
from switchtitan.files import format_bytes, make_folder, named_errors, sync_folder

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

POLL_INTERVAL = 10
"""Calls of `Checkpointer.poll` between two in which ranks communicate."""
_WRITER = "checkpoint-writer"
"""Start of the names of threads that write."""


class Checkpointer:
    """Saves a run's state to `folder` and finds the checkpoint to resume from. Every method is
    collective.

    Args:
        folder: `<output_dir>/checkpoints`, on a file system that all ranks see; created on first
            use.
        identity: the values that may not change on resume (see `check_same_run`).
        metadata: for the reader: the configuration, the corpus.
        versions: of libraries and code, by name.

    Attributes:
        latest: the newest checkpoint that this object completed.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: World,
        *,
        identity: Mapping[str, JsonValue],
        metadata: Mapping[str, JsonValue],
        versions: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._config = config
        self._world = world
        # A group of its own, since a thread and the training loop must not share one.
        self._writers = replace(world, host_group=world.new_host_group())
        self._identity = json.loads(json.dumps(dict(identity)))
        self._metadata = json.loads(json.dumps(dict(metadata)))
        self._versions = dict(versions)
        self._host_memory = HostMemory()
        self._in_flight: Future[Path] | None = None
        self._num_polls = 0
        self._resumed: Path | None = None
        self.latest: Path | None = None

    @property
    def resume_point(self) -> Path | None:
        """The checkpoint to resume from if the run stopped now; None if there is none yet."""
        return self.latest or self._resumed

    def checkpoint_to_resume(self) -> Path | None:
        """Returns the checkpoint to resume from, the same on every rank; None for a new run.

        Raises:
            CheckpointError: on every rank, if it is damaged or missing, or the folder holds another
                run's checkpoints.
        """

        def find() -> Path | None:
            is_main = self._world.is_main
            return find_checkpoint(self._folder, self._config.resume) if is_main else None

        self._resumed = self._world.together(find)[0]
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
        metadata = CheckpointMetadata(
            format_version=FORMAT_VERSION,
            step=step,
            train_state=json.loads(json.dumps(dict(train_state))),
            identity=self._identity,
            run={"saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._metadata},
            versions=self._versions,
        )
        if not self._config.async_save:
            self.latest = self._write(metadata, tensors)
            return
        # Not dcp.async_save: if one rank cannot copy, the others would hang.
        copies: dict[str, Tensor] = {}
        self._world.together(lambda: copies.update(self._host_memory.copy(tensors)))
        self._num_polls = 0
        # The interpreter waits for the thread at its exit.
        thread = ThreadPoolExecutor(1, thread_name_prefix=_WRITER)
        self._in_flight = thread.submit(self._write, metadata, copies)
        thread.shutdown(wait=False)

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
        if self._num_polls % POLL_INTERVAL == 0:
            is_done = torch.tensor(int(self._in_flight.done()))
            dist.all_reduce(is_done, dist.ReduceOp.MIN, group=self._world.host_group)
            if is_done:
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
            self.latest = in_flight.result()
        finally:
            # Ctrl-C ends the wait, not the save.
            if in_flight.done():
                self._in_flight = None

    def _write(self, metadata: CheckpointMetadata, tensors: Mapping[str, Tensor]) -> Path:
        """Writes a checkpoint and deletes older ones; every rank gets the same result or error."""
        started_at, is_main = time.monotonic(), self._world.is_main
        final = self._folder / step_folder_name(metadata.step)
        partial = _partial_folder(final)
        try:
            self._together(lambda: _make_partial_folder(final) if is_main else None)
            of_ranks = self._together(
                lambda: write_tensors(partial, tensors, self._writers.host_group)
            )
            sums = {name: digest for of_rank in of_ranks for name, digest in of_rank.items()}
            self._together(lambda: _seal(final, metadata, sums) if is_main else None)
        except CheckpointError as error:
            space = ""
            if is_main:
                with suppress(OSError):
                    _remove(partial)
            with suppress(OSError):
                space = f"{format_bytes(shutil.disk_usage(self._folder).free)} are free; "
            raise CheckpointError(
                f"cannot save step {metadata.step} to {self._folder}: {error}; {space}older "
                "checkpoints are untouched"
            ) from error
        if is_main:
            logger.info("saved %s in %.1f s", final, time.monotonic() - started_at)
            self._prune(final)
        return final

    def _together(self, function: Callable[[], Result]) -> list[Result]:
        def expect_errors() -> Result:
            with as_checkpoint_error():
                return function()

        return self._writers.together(expect_errors)

    def _prune(self, newest: Path) -> None:
        """Deletes all but the newest `keep_latest` of this run's checkpoints; raises nothing.

        Those newer than `newest`, of other runs, damaged so that it shows without reading tensors,
        or with files of others are neither deleted nor counted.
        """
        if self._config.keep_latest == 0:
            return
        present = list_step_folders(self._folder)
        older = present[present.index(newest) + 1 :]
        try:
            own = [path for path in older if self._is_own(path)]
            for path in own[self._config.keep_latest - 1 :]:
                # Renamed first, so that an interrupted deletion leaves nothing that looks like a
                # checkpoint.
                _remove(path.rename(_partial_folder(path)))
                logger.debug("deleted the older checkpoint %s", path)
        except OSError as error:
            logger.warning("could not delete an older checkpoint: %s", error)

    def _is_own(self, path: Path) -> bool:
        try:
            metadata = read_metadata(path)
        except CheckpointError as error:
            logger.warning("not deleting an older checkpoint: %s", error)
            return False
        foreign = [file.name for file in path.iterdir() if not is_own_file(file.name)]
        if foreign:
            logger.warning("not deleting %s, which holds other files: %s", path, foreign)
        return not foreign and metadata.identity == self._identity


def join_writers(timeout_s: float) -> bool:
    """Waits for all background saves of this process; returns whether they have ended."""
    deadline = time.monotonic() + timeout_s
    writers = [thread for thread in threading.enumerate() if thread.name.startswith(_WRITER)]
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))
    return not any(writer.is_alive() for writer in writers)


def _partial_folder(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _make_partial_folder(final: Path) -> None:
    """Makes room for a checkpoint at `final`, and deletes what earlier failures have left."""
    make_folder(final.parent)
    for leftover in final.parent.glob(".step-*.partial"):
        try:
            _remove(leftover)
        except OSError as error:
            logger.warning("could not delete what is left of a checkpoint: %s", error)
    if final.exists():
        # As thorough as the search on resume: what was skipped there must not block a save here.
        if is_complete(final):
            raise CheckpointError(f"{final} already exists and is complete; it is not overwritten")
        final.rename(final.with_name(f"{final.name}.damaged-{time.time_ns()}"))
    _partial_folder(final).mkdir()


def _remove(folder: Path) -> None:
    """Deletes a checkpoint's folder.

    Raises:
        OSError: if it holds other files, which are not deleted.
    """
    for file in folder.iterdir():
        if is_own_file(file.name):
            file.unlink()
    folder.rmdir()


def _seal(final: Path, metadata: CheckpointMetadata, sums: dict[str, str]) -> None:
    """Writes what describes the tensors' files, and gives the folder its final name."""
    partial = _partial_folder(final)
    text = metadata.model_dump_json(indent=2)
    own_sum = hashlib.sha256(text.encode()).hexdigest()
    _write_flushed(partial / METADATA_FILE, text)
    _write_flushed(partial / SUMS_FILE, sums_text(sums | {METADATA_FILE: own_sum}))
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def _write_flushed(file: Path, text: str) -> None:
    with named_errors(file), file.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
