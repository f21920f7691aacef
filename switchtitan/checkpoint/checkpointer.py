"""Save a run's checkpoints, optionally in the background; find, verify and delete them.

    <output_dir>/checkpoints/step-000001000/
        metadata.json       format, step, training state, the run's identity and configuration
        .metadata           dtype, shape and pieces of every tensor (torch.distributed.checkpoint)
        __<rank>_0.distcp   the pieces that a rank wrote
        SHA256SUMS          of the files above; `sha256sum -c SHA256SUMS` checks them too

A save writes to `.step-000001000.partial`: every file is flushed to disk and hashed, then the
folder is renamed. So a folder named step-N is complete, whenever the process or the power fails.
"""

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field, JsonValue
from torch import Tensor

from switchtitan.checkpoint.config import RESUME_AUTO, RESUME_NEVER, CheckpointConfig
from switchtitan.checkpoint.tensors import (
    TENSOR_FILES,
    copy_to_host,
    files_of_tensors,
    own_share,
    reading,
    write_tensors,
)
from switchtitan.config import flatten
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import (
    exists,
    file_inside,
    make_folder,
    named_errors,
    sha256_of_file,
    sync_folder,
)
from switchtitan.process import progress_bar

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of checkpoints in a run's output folder."""
METADATA_FILE, SUMS_FILE = "metadata.json", "SHA256SUMS"
FORMAT_VERSION = 5
"""Earlier ones have an index of their own instead of torch's, and other checksums."""
POLL_INTERVAL = 10
"""Calls of `Checkpointer.poll` between two in which ranks communicate."""
_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_SUMS_LINE = re.compile(rf"([0-9a-f]{{64}})  ({TENSOR_FILES}|{METADATA_FILE})\n")
_OWN_FILE = re.compile(rf"{TENSOR_FILES}|{METADATA_FILE}|{SUMS_FILE}")
_WRITER = "checkpoint-writer"
"""Start of the names of threads that write."""


class CheckpointMetadata(BaseModel, frozen=True, extra="forbid"):
    """The contents of `metadata.json`."""

    format_version: int
    step: int = Field(ge=0)
    """Optimizer steps done."""
    train_state: dict[str, JsonValue]
    """The trainer's state, e.g. the number of tokens seen."""
    identity: dict[str, dict[str, JsonValue]]
    """The values that may not change on resume, by section: model, method, corpus."""
    run: dict[str, JsonValue]
    """For the reader: the configuration, the corpus, the time."""
    versions: dict[str, str]
    """Versions of the code that wrote it."""

    @property
    def config(self) -> str:
        """The configuration of the run that saved the checkpoint, as TOML."""
        return str(self.run["config"])

    def identity_value(self, section: str, key: str) -> JsonValue:
        if key not in self.identity.get(section, {}):
            raise CheckpointError(f"{METADATA_FILE}: identity.{section}.{key} is missing")
        return self.identity[section][key]

    def identity_number(self, section: str, key: str) -> int:
        number = self.identity_value(section, key)
        if not isinstance(number, int):
            raise CheckpointError(f"{METADATA_FILE}: identity.{section}.{key} = {number!r}")
        return number


class Checkpointer:
    """Saves a run's state to `folder` and finds the checkpoint to resume from; all collective.

    Args:
        folder: `<output_dir>/checkpoints`, seen by all ranks; created on first use.
        identity, metadata, versions: see `CheckpointMetadata`; `metadata` becomes its `run`.
        latest: the checkpoint to resume from if the run stopped now; later the newest complete one.
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
        latest: Path | None = None,
    ) -> None:
        self._folder, self._config, self._world = folder, config, world
        # A group of its own, since a thread and the training loop must not share one.
        self._writers = replace(world, host_group=world.new_host_group())
        self._described = {"identity": identity, "run": metadata, "versions": versions}
        self._host_copies: dict[str, Tensor] = {}
        self._in_flight: Future[Path] | None = None
        self._num_polls = 0
        self.latest = latest
        self._skipped = _newer_than(latest, folder)

    @property
    def resumes_newest(self) -> bool:
        """Whether the same command resumes from the newest checkpoint."""
        return self._config.resume == RESUME_AUTO

    def save(
        self, step: int, tensors: Mapping[str, Tensor], train_state: Mapping[str, JsonValue]
    ) -> None:
        """Writes `<folder>/step-<step>`; waits for an earlier save in progress.

        With `async_save`, returns once `tensors` are copied and may change; `poll` or `finish`
        completes the save.

        Args:
            tensors: DTensors, or plain tensors that are the same on every rank.

        Raises:
            CheckpointError: on every rank, if this save or the earlier one fails; older checkpoints
                are untouched.
        """
        self.finish()
        described = {"format_version": FORMAT_VERSION, "step": step, "train_state": train_state}
        metadata = CheckpointMetadata.model_validate_json(json.dumps(described | self._described))
        metadata.run["saved_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        own = own_share(tensors, self._world)
        if not self._config.async_save:
            self.latest = self._write(metadata, own)
            return
        # Not dcp.async_save: if one rank cannot copy, the others would hang.
        copies: dict[str, Tensor] = {}
        self._world.together(lambda: copies.update(copy_to_host(own, self._host_copies)))
        self._num_polls = 0
        # The interpreter waits for the thread at its exit.
        thread = ThreadPoolExecutor(1, thread_name_prefix=_WRITER)
        self._in_flight = thread.submit(self._write, metadata, copies)
        thread.shutdown(wait=False)

    def poll(self) -> None:
        """Calls `finish` if every rank has written. Call it each step.

        The ranks ask each other only in every `POLL_INTERVAL`-th call, since that makes all hosts
        wait for the slowest.
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
        """Waits until a background save is complete; raises its error, on every rank."""
        if self._in_flight is not None:
            # After Ctrl-C, the interpreter still waits for the thread.
            in_flight, self._in_flight = self._in_flight, None
            self.latest = in_flight.result()

    def _write(self, metadata: CheckpointMetadata, tensors: Mapping[str, Tensor]) -> Path:
        """Writes a checkpoint and deletes older ones; every rank gets the same result or error."""
        started_at, is_main = time.monotonic(), self._world.is_main
        final = self._folder / _step_name(metadata.step)
        partial = _partial_folder(final)
        group = self._writers.host_group
        try:
            self._writers.together(lambda: _make_partial_folder(final) if is_main else None)
            sums = self._writers.together(lambda: write_tensors(partial, tensors, group))
            self._writers.together(lambda: _seal(final, metadata, sums) if is_main else None)
        except CheckpointError as error:
            if is_main:
                with suppress(OSError):
                    _remove(partial)
            raise CheckpointError(
                f"cannot save step {metadata.step} to {self._folder}: {error}; older checkpoints "
                "are untouched"
            ) from error
        if is_main:
            logger.info("saved %s in %.1f s", final, time.monotonic() - started_at)
            self._prune(metadata)
        return final

    def _prune(self, newest: CheckpointMetadata) -> None:
        """Deletes all but the newest `keep_latest` of this run's checkpoints; raises nothing.

        Those of later steps, of other runs, with unreadable metadata or with files of others, and
        those that the search on resume has found damaged, stay and do not count.
        """
        num_kept = 0
        self._skipped.discard(_step_name(newest.step))
        for path in list_step_folders(self._folder) if self._config.keep_latest else ():
            if path.name in self._skipped:
                continue
            try:
                metadata = read_metadata(path)
                is_own = all(_OWN_FILE.fullmatch(file.name) for file in path.iterdir())
                is_own = is_own and metadata.identity == newest.identity
                if is_own and metadata.step <= newest.step:
                    num_kept += 1
                    if num_kept > self._config.keep_latest:
                        # Renamed first: what an interrupted deletion leaves is no checkpoint.
                        _remove(path.rename(_partial_folder(path)))
            except (OSError, CheckpointError) as error:
                logger.warning("could not delete an older checkpoint: %s", error)


def join_writers(timeout_s: float) -> bool:
    """Waits for all background saves of this process; returns whether they have ended."""
    deadline = time.monotonic() + timeout_s
    writers = [thread for thread in threading.enumerate() if thread.name.startswith(_WRITER)]
    for writer in writers:
        writer.join(max(0.0, deadline - time.monotonic()))
    return not any(writer.is_alive() for writer in writers)


# The folder of a checkpoint.
def _step_name(step: int) -> str:
    return f"step-{step:09d}"


def _partial_folder(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


@contextmanager
def _errors_of_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(error)) from error


@_errors_of_disk()
def _make_partial_folder(final: Path) -> None:
    """Makes room for a checkpoint, and deletes what interrupted saves and deletions have left."""
    make_folder(final.parent)
    for leftover in final.parent.glob(".step-*.partial"):
        try:
            _remove(leftover)
        except OSError as error:
            logger.warning("could not delete what is left of a checkpoint: %s", error)
    if final.exists():
        # The search on resume has skipped it.
        aside = final.rename(final.with_name(f"{final.name}.replaced-{time.time_ns()}"))
        logger.warning("renamed %s to %s", final, aside.name)
    _partial_folder(final).mkdir()


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@_errors_of_disk()
def _seal(final: Path, metadata: CheckpointMetadata, of_ranks: list[dict[str, str]]) -> None:
    """Writes what describes the tensors' files, and gives the folder its final name."""
    partial = _partial_folder(final)
    text = metadata.model_dump_json(indent=2)
    sums = {METADATA_FILE: hashlib.sha256(text.encode()).hexdigest()}
    for of_rank in of_ranks:
        sums |= of_rank
    for name, contents in ((METADATA_FILE, text), (SUMS_FILE, _sums_text(sums))):
        file = partial / name
        with named_errors(file), file.open("x", encoding="utf-8") as stream:
            stream.write(contents)
            stream.flush()
            os.fsync(stream.fileno())
    sync_folder(partial)
    partial.rename(final)
    sync_folder(final.parent)


def _sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_metadata(path: Path) -> CheckpointMetadata:
    """Reads a checkpoint's `metadata.json`, without comparing checksums.

    Raises:
        CheckpointFormatError: if this version does not read the format.
        CheckpointError: if it is missing or damaged.
    """
    with reading(path / METADATA_FILE):
        contents = json.loads((path / METADATA_FILE).read_bytes())
        version = contents["format_version"]
        if version == FORMAT_VERSION:
            return CheckpointMetadata.model_validate(contents)
    raise CheckpointFormatError(
        f"{path}: the checkpoint has format {version}, but this version of switchtitan reads "
        f"format {FORMAT_VERSION}; resume, evaluate or export it with the version that wrote it, "
        "or start a new run in another [job] output_dir"
    )


def verify(path: Path) -> CheckpointMetadata:
    """Compares all files with their checksums, which reads the full checkpoint once.

    Raises:
        CheckpointFormatError: if this version does not read the format.
        CheckpointError: names the first problem.
    """
    if not (path / SUMS_FILE).exists():
        read_metadata(path)  # earlier formats have no such file
    with reading(path / SUMS_FILE):
        text = file_inside(path, SUMS_FILE).read_text(encoding="ascii")
    sums = {name: digest for digest, name in _SUMS_LINE.findall(text)}
    if text != _sums_text(sums) or not sums.keys() >= {METADATA_FILE, ".metadata"}:
        raise CheckpointError(f"{path}: {SUMS_FILE} is corrupted")
    with ThreadPoolExecutor(4) as readers, reading(path):  # hashlib releases the GIL
        found = readers.map(lambda name: sha256_of_file(file_inside(path, name)), sums)
        bar = progress_bar(f"verifying {path.name}", found, total=len(sums), unit="files")
        for (name, expected), digest in zip(sums.items(), bar, strict=True):
            if digest != expected:
                raise CheckpointError(f"{path}: {name} differs from its checksum in {SUMS_FILE}")
    if missing := files_of_tensors(path) - sums.keys():
        raise CheckpointError(f"{path}: {SUMS_FILE} lacks {', '.join(sorted(missing))}")
    return read_metadata(path)


# The checkpoint to resume from.
def step_of(path: Path) -> int | None:
    """The step in the name of a complete checkpoint's folder; None for another name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like complete checkpoints, newest first."""
    try:
        entries = list(folder.iterdir())  # `glob` would find nothing where a disk fails
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(str(error)) from error
    found = [path for path in entries if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def _newer_than(checkpoint: Path | None, folder: Path) -> set[str]:
    """The names of the checkpoints in `folder` that were skipped for `checkpoint`, also in it."""
    if checkpoint is None or checkpoint.resolve().parent != folder.resolve():
        return set()
    step = step_of(checkpoint.resolve()) or 0
    return {path.name for path in list_step_folders(folder) if (step_of(path) or 0) > step}


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None; logs why it skips one."""
    for path in list_step_folders(folder):
        try:
            verify(path)
            return path
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            logger.warning("skipping an incomplete checkpoint: %s", error)
    return None


def find_given(path: Path) -> Path:
    """Returns the complete checkpoint at `path`, or the newest one of the run or folder there.

    Raises:
        CheckpointError: if there is none, or this version does not read its format.
    """
    if (path / METADATA_FILE).is_file():
        verify(path)
        return path
    if latest := find_latest(path) or find_latest(path / CHECKPOINTS_FOLDER):
        return latest
    raise CheckpointError(
        f"no complete checkpoint at {path}: expected a folder step-000001000 with {METADATA_FILE}, "
        "a folder of such folders, or a run's output folder"
    )


def find_checkpoint(folder: Path, config: CheckpointConfig) -> Path | None:
    """Returns the checkpoint that a run resumes from; None means a new run.

    Args:
        folder: the run's own checkpoints; need not exist.

    Raises:
        CheckpointError: if the given checkpoint or initial weights are missing or damaged, or all
            own checkpoints are, or the run would mix its checkpoints with those of another.
    """
    resume, present = config.resume, list_step_folders(folder)
    continued = {path.resolve() for path in (folder, folder.parent, *present[:1])}
    if resume == RESUME_AUTO:
        if present and (latest := find_latest(folder)):
            return latest
        if present:
            raise CheckpointError(
                f"[checkpoint] resume = 'auto': none of the {len(present)} checkpoints in {folder} "
                "is complete (see the warnings above); move that folder away to start from scratch"
            )
    elif present and (resume == RESUME_NEVER or Path(resume).resolve() not in continued):
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} already holds {len(present)} checkpoints, "
            f"the newest is {present[0].name}; use another [job] output_dir, or move that folder "
            "away, or set resume = 'auto' to resume from the newest"
        )
    elif resume != RESUME_NEVER:
        try:
            return find_given(Path(resume))
        except CheckpointError as error:
            raise type(error)(f"[checkpoint] resume = {resume!r}: {error}") from error
    weights = config.initial_weights
    if weights is not None and not exists(Path(weights)):
        raise CheckpointError(f"[checkpoint] initial_weights = {weights!r}: no such file or folder")
    return None


def check_same_run(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Compares two identities, nested mappings of plain values.

    Raises:
        CheckpointError: names every differing key by its dotted path, with both values and the fix.
    """
    before, now, absent = flatten(saved), flatten(current), "(absent)"
    differences = "".join(
        f"\n  {key}: saved with {before.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in {**before, **now}
        if before.get(key, absent) != now.get(key, absent)
    )
    if differences:
        raise CheckpointError(
            f"the checkpoint belongs to another run:{differences}\n"
            "set these back to resume that run, or start a new one in another [job] output_dir"
        )
