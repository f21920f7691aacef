"""Save a run's checkpoints, optionally in the background, and find the one to resume from."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import JsonValue
from torch import Tensor

from switchtitan.checkpoint.agreement import ignore_warning_about_single_process, run_together
from switchtitan.checkpoint.background import write_in_background
from switchtitan.checkpoint.config import STOP, CheckpointConfig
from switchtitan.checkpoint.disk_space import (
    check_room,
    estimate_bytes,
    warn_if_next_does_not_fit,
)
from switchtitan.checkpoint.find import check_output_folder, find_checkpoint, prune
from switchtitan.checkpoint.metadata import FORMAT_VERSION, CheckpointMetadata
from switchtitan.checkpoint.save import Save, complete_save, prepare_save, remove_leftovers
from switchtitan.checkpoint.staging import HostCopies, own_share
from switchtitan.errors import CheckpointError

logger = logging.getLogger(__name__)

POLL_INTERVAL = 10
"""Calls of `Checkpointer.poll` between two in which ranks communicate."""


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
        self._versions = dict(versions or {})
        self._comparable_identity = comparable_identity
        self._is_main = is_main
        self._group = group
        self._background_group = background_group
        self._in_flight: Future[_Saved] | None = None
        self._latest: Path | None = None
        self._resumed: Path | None = None
        self._num_polls = 0
        self._host_copies = HostCopies()
        self._num_failed_saves = 0
        self._failure: CheckpointError | None = None
        self._num_bytes: int | None = None
        self._num_saves_left: int | None = None

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint that this object completed."""
        return self._latest

    @property
    def num_failed_saves(self) -> int:
        """Saves that failed; the run continued (`on_failure = "continue"`)."""
        return self._num_failed_saves

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

    def check_room(self, tensors: Mapping[str, Tensor], num_saves: int) -> None:
        """Foretells whether the disk has room for the saves to come; logs a warning if not.

        Args:
            tensors: what each save will hold.
            num_saves: saves to come. After each of them, a warning says if the next does not fit.

        Raises:
            CheckpointError: on every rank, if the first save will fail and `on_failure` is "stop".
        """
        num_bytes = estimate_bytes(tensors.values(), self._num_ranks)
        self._num_saves_left = num_saves

        def check() -> None:
            remove_leftovers(self._folder)
            check_room(self._folder, self._config, num_bytes, num_saves)

        run_together(lambda: check() if self._is_main else None, self._group)

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
            CheckpointError: on every rank, if this save or the earlier one fails and `on_failure`
                is "stop"; older checkpoints are untouched.
        """
        self.finish()
        if self._num_saves_left is not None:
            self._num_saves_left -= 1
        save = Save(
            self._folder,
            CheckpointMetadata(
                format_version=FORMAT_VERSION,
                step=step,
                train_state=json.loads(json.dumps(dict(train_state))),
                identity=self._identity,
                run={"saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **self._metadata},
                versions=self._versions,
                files={},
            ),
            names=frozenset(tensors),
            num_bytes=self._num_bytes or estimate_bytes(tensors.values(), self._num_ranks),
            started_at=time.monotonic(),
        )
        if self._background_group is None:
            ignore_warning_about_single_process()
        try:
            prepare_save(save, self._is_main, self._group)
            own = own_share(tensors)
            if self._config.async_save:
                # Not dcp.async_save: if one rank cannot copy, the others would hang.
                staged: dict[str, Tensor] = {}
                run_together(lambda: staged.update(self._host_copies(own)), self._group)
                self._num_polls = 0
                self._in_flight = write_in_background(lambda: self._complete(save, staged))
            else:
                self._succeed(self._complete(save, own))
        except CheckpointError as error:
            self._fail(error)

    @property
    def is_writing(self) -> bool:
        """Whether a background save of this rank is under way. Not collective."""
        return self._in_flight is not None and not self._in_flight.done()

    def poll(self) -> None:
        """Completes a background save if every rank has written it. Call it each step.

        The ranks ask each other only in every `POLL_INTERVAL`-th call, since that makes all hosts
        wait for the slowest.

        Raises:
            CheckpointError: on every rank in the same call, if the save failed and `on_failure` is
                "stop".
        """
        if self._in_flight is None:
            return
        self._num_polls += 1
        if self._num_polls % POLL_INTERVAL == 0 and self._all_ranks(self._in_flight.done()):
            self.finish()

    def finish(self) -> None:
        """Waits until a background save is complete.

        Raises:
            CheckpointError: on every rank, if it failed and `on_failure` is "stop".
        """
        if self._in_flight is None:
            return
        in_flight = self._in_flight
        try:
            self._succeed(in_flight.result())
        except CheckpointError as error:
            self._fail(error)
        finally:
            # Ctrl-C ends the wait, not the save.
            if in_flight.done():
                self._in_flight = None

    def raise_last_failure(self) -> None:
        """Raises the error of the newest save, if it failed: a run must not end without its state.

        Raises:
            CheckpointError: on every rank.
        """
        if self._failure is not None:
            way_out = "there is none to resume from"
            if self.resume_point is not None:
                way_out = f"the same command resumes from {self.resume_point}"
            raise CheckpointError(
                f"the last checkpoint was not saved, {way_out}: {self._failure}"
            ) from self._failure

    def _succeed(self, saved: "_Saved") -> None:
        self._latest, self._num_bytes, self._failure = saved.path, saved.num_bytes, None

    def _fail(self, error: CheckpointError) -> None:
        if self._config.on_failure == STOP:
            raise error
        self._failure = error
        self._num_failed_saves += 1
        if self._is_main:
            logger.error(
                "%s. Training continues; the newest complete checkpoint is %s",
                error,
                self.resume_point or "none yet",
            )

    def _all_ranks(self, claim: bool) -> bool:
        if self._group is None:
            return claim
        num_ranks = torch.tensor(int(claim))
        dist.all_reduce(num_ranks, group=self._group)
        return num_ranks.item() == dist.get_world_size(self._group)

    @property
    def _num_ranks(self) -> int:
        return 1 if self._group is None else dist.get_world_size(self._group)

    def _on_main(self, function: Callable[[], Path | None]) -> Path | None:
        return run_together(lambda: function() if self._is_main else None, self._group)[0]

    def _complete(self, save: Save, tensors: Mapping[str, Tensor]) -> "_Saved":
        """Writes `save` and deletes older checkpoints; every rank gets the same result or error."""
        num_bytes = complete_save(save, tensors, self._is_main, self._background_group)
        if self._is_main:
            self._make_room(save.final, num_bytes)
        return _Saved(save.final, num_bytes)

    def _make_room(self, newest: Path, num_bytes: int) -> None:
        """Deletes older checkpoints; warns if the next one will not fit. Raises nothing."""
        try:
            prune(self._folder, newest, self._config.keep_latest, self._is_own_identity)
        except OSError as error:
            logger.warning("could not delete an older checkpoint: %s", error)
        if self._num_saves_left is None or self._num_saves_left > 0:
            with suppress(OSError):
                warn_if_next_does_not_fit(self._folder, num_bytes)

    def _is_own_identity(self, saved: Mapping[str, object]) -> bool:
        return self._comparable_identity(saved) == self._identity


@dataclass(frozen=True)
class _Saved:
    """A complete checkpoint and its bytes on disk."""

    path: Path
    num_bytes: int
