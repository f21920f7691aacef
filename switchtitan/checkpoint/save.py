"""Saves a run's checkpoints, optionally in the background, and deletes older ones.

    <output_dir>/checkpoints/step-000001000/
        metadata.json       format, step, training state, the run's identity and configuration
        .metadata           dtype, shape and pieces of every tensor (torch.distributed.checkpoint)
        __<rank>_0.distcp   the pieces that a rank wrote
        SHA256SUMS          of the files above; `sha256sum -c SHA256SUMS` checks them too

A save writes to `.step-000001000.partial`: every file is flushed to disk and hashed, then the
folder is renamed. So a folder named step-N is complete, whenever the process or the power fails.
"""

import hashlib
import io
import json
import logging
import os
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, Field, JsonValue
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, filesystem
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.tensor import DTensor

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import local, replica_group, with_local
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError
from switchtitan.files import make_folder, named_errors, rename_complete, write_flushed

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINTS_FOLDER = "checkpoints"
METADATA_FILE, SUMS_FILE = "metadata.json", "SHA256SUMS"
TENSOR_FILES = r"__\d+_\d+\.distcp|\.metadata"
"""A pattern of the names of the files that torch writes: one for each rank, and the index."""
FORMAT_VERSION = 6
"""Earlier ones name their corpus by the times of its files."""
POLL_INTERVAL = 10
"""Steps between two after which ranks ask each other whether they have written."""
MODEL, OPTIMIZER = "model.", "optimizer."
"""Prefixes of the names of tensors."""
_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_OWN_FILE = re.compile(rf"{TENSOR_FILES}|{METADATA_FILE}|{SUMS_FILE}")
_WRITER = "checkpoint-writer"
"""Start of the names of threads that write."""


class CheckpointMetadata(BaseModel, frozen=True, extra="forbid"):
    """The contents of `metadata.json`."""

    format_version: int = Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)
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

    def identity_value(self, section: str, key: str, expected: type[T]) -> T:
        """Returns a value of `identity`; a CheckpointError if it is missing or of another type."""
        value = self.identity.get(section, {}).get(key)
        if not isinstance(value, expected):
            raise CheckpointError(f"{METADATA_FILE}: identity.{section}.{key} = {value!r}")
        return value


class CheckpointTensors:
    """All tensors of a run's checkpoint, sharing memory with the model and the optimizer.

    Build it while parameters are sharded: FSDP replaces them during forward passes.
    """

    def __init__(self, model: nn.Module, optimizer: TrainingOptimizer) -> None:
        self.optimizer = optimizer
        state = model.state_dict(keep_vars=True)
        self.model = {f"{MODEL}{name}": tensor.detach() for name, tensor in state.items()}
        """Those of the model, by name."""

    def __call__(self) -> dict[str, Tensor]:
        """Returns all tensors by name, with the current optimizer state."""
        state = self.optimizer.state_dict()
        return self.model | {f"{OPTIMIZER}{name}": tensor for name, tensor in state.items()}


@dataclass(eq=False)
class Checkpointer:
    """Saves a run's state to `folder`; all collective."""

    folder: Path
    """`<output_dir>/checkpoints`, seen by all ranks; created on first use."""
    config: CheckpointConfig
    world: World
    described: Mapping[str, Mapping[str, JsonValue]]
    """`identity`, `run` and `versions` of `CheckpointMetadata`."""
    latest: Path | None = None
    """The checkpoint to resume from if the run stopped now; later the newest complete one."""

    def __post_init__(self) -> None:
        # A thread and the training loop must not share a group, nor its later timeout.
        group = dist.new_group(backend="gloo", timeout=self.world.timeout)
        self._writers = replace(self.world, host_group=group)
        self._host_copies: dict[str, Tensor] = {}
        self._in_flight: Future[Path] | None = None
        # Newer ones were found damaged by the search for `latest`.
        newest = sys.maxsize if self.latest is None else step_of(self.latest.resolve())
        self._skipped = {path for path in list_step_folders(self.folder) if step_of(path) > newest}

    def save(
        self, step: int, tensors: Mapping[str, Tensor], train_state: Mapping[str, JsonValue]
    ) -> None:
        """Writes `<folder>/step-<step>`: DTensors, or plain tensors that are the same on every
        rank. Waits for an earlier save in progress.

        With `async_save`, returns once `tensors` are copied and may change; `poll` or `finish`
        completes the save. Raises a CheckpointError on every rank if this save or the earlier one
        fails; older checkpoints are untouched.
        """
        self.finish()
        state = {"format_version": FORMAT_VERSION, "step": step, "train_state": train_state}
        metadata = CheckpointMetadata.model_validate_json(json.dumps({**state, **self.described}))
        metadata.run["saved_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        own = {name: tensors[name] for name in tensors if self._writes(name, tensors[name])}
        if not self.config.async_save:
            self.latest = self._write(metadata, own)
            return
        # Not dcp.async_save: if one rank cannot copy, the others would hang.
        copies: dict[str, Tensor] = {}
        self.world.together(lambda: copies.update(copy_to_host(own, self._host_copies)))
        # The interpreter waits for the thread at its exit, also after Ctrl-C.
        thread = ThreadPoolExecutor(1, thread_name_prefix=_WRITER)
        self._in_flight = thread.submit(self._write, metadata, copies)
        thread.shutdown(wait=False)

    def _writes(self, name: str, tensor: Tensor) -> bool:
        """Whether a hash of the name chooses this rank among those that hold the same values."""
        is_sharded = isinstance(tensor, DTensor)
        group = replica_group(tensor) if is_sharded else self.world.host_group
        return group is None or zlib.crc32(name.encode()) % group.size() == group.rank()

    def poll(self, step: int) -> None:
        """Calls `finish` if every rank has written. Call it after each step.

        The ranks ask each other only after every `POLL_INTERVAL`-th step, since that makes all
        hosts wait for the slowest.
        """
        if self._in_flight is not None and step % POLL_INTERVAL == 0:
            is_done = torch.tensor(int(self._in_flight.done()))
            dist.all_reduce(is_done, dist.ReduceOp.MIN, group=self.world.host_group)
            if is_done:
                self.finish()

    def finish(self) -> None:
        """Waits until a background save is complete; raises its error, on every rank."""
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            self.latest = in_flight.result()

    def _write(self, metadata: CheckpointMetadata, tensors: dict[str, Tensor]) -> Path:
        """Writes a checkpoint and deletes older ones; every rank gets the same result or error."""
        started_at, writers = time.monotonic(), self._writers
        final = self.folder / f"step-{metadata.step:09d}"
        partial = _partial_folder(final)
        try:
            writers.on_main(lambda: _make_partial_folder(final))
            sums = writers.together(lambda: _write_tensors(partial, tensors, writers.host_group))
            writers.on_main(lambda: _seal(final, metadata, sums))
        except CheckpointError as error:
            if writers.is_main and os.path.exists(partial):
                _remove(partial)
            raise CheckpointError(
                f"cannot save step {metadata.step} to {self.folder}: {error}; older checkpoints "
                "are untouched"
            ) from error
        if writers.is_main:
            logger.info("saved %s in %.1f s", final, time.monotonic() - started_at)
            self._skipped.discard(final)
        # Together: deleting may take longer than the next step's collectives wait.
        writers.on_main(lambda: self._prune(metadata))
        return final

    def _prune(self, newest: CheckpointMetadata) -> None:
        """Deletes all but the newest `keep_latest` and every `keep_every`-th of this run's
        checkpoints.

        Those of later steps, of other runs, with unreadable metadata or with files of others, and
        those that the search on resume has found damaged, stay and do not count.
        """
        num_newest, keep_every = 0, self.config.keep_every
        try:
            folders = list_step_folders(self.folder) if self.config.keep_latest else []
        except CheckpointError as error:
            logger.warning("could not delete older checkpoints: %s", error)
            return
        for path in folders:
            try:
                text = (path / METADATA_FILE).read_bytes()
                metadata = CheckpointMetadata.model_validate_json(text)
                is_own = all(_OWN_FILE.fullmatch(file.name) for file in path.iterdir())
                is_own = is_own and path not in self._skipped
                if is_own and metadata.identity == newest.identity and metadata.step <= newest.step:
                    num_newest += 1
                    is_kept = keep_every is not None and metadata.step % keep_every == 0
                    if num_newest > self.config.keep_latest and not is_kept:
                        # Renamed first: what an interrupted deletion leaves is no checkpoint.
                        _remove(path.rename(_partial_folder(path)))
            except (OSError, ValueError) as error:
                logger.warning("could not delete an older checkpoint, %s: %s", path, error)


def join_writers(timeout_s: float) -> bool:
    """Waits for the background save of this process; returns whether it has ended."""
    writers = [thread for thread in threading.enumerate() if thread.name.startswith(_WRITER)]
    for writer in writers:
        writer.join(timeout_s)
    return not any(writer.is_alive() for writer in writers)


@torch.no_grad()
def copy_to_host(tensors: Mapping[str, Tensor], reused: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of the local shards on the host, complete; the host waits once for all.

    `reused` is host memory by name, page-locked for tensors on CUDA, to which what is missing is
    added. Writing to memory that is already allocated takes a quarter of the time.
    """
    shards = {name: local(tensor) for name, tensor in tensors.items()}
    for name, shard in shards.items():
        held = reused.get(name)
        if held is None or (held.shape, held.dtype) != (shard.shape, shard.dtype):
            # Page-locked memory is reserved in powers of two.
            reused[name] = torch.empty_like(shard, device="cpu", pin_memory=shard.is_cuda)
        reused[name].copy_(shard, non_blocking=True)
    if any(shard.is_cuda for shard in shards.values()):
        torch.cuda.current_stream().synchronize()
    return {name: with_local(tensor, reused[name]) for name, tensor in tensors.items()}


# Writing.
@contextmanager
def _errors_of_disk() -> Iterator[None]:
    """Raises a CheckpointError for what disks do; other errors are bugs."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(error)) from error
    except CheckpointException as error:  # no Exception
        causes = {rank: cause for rank, (cause, _) in error.failures.items()}
        if not all(isinstance(cause, OSError) for cause in causes.values()):
            raise RuntimeError(str(error)) from error
        reasons = (f"on rank {rank}: {cause}" for rank, cause in causes.items())
        raise CheckpointError("; ".join(reasons)) from error


@_errors_of_disk()
def _make_partial_folder(final: Path) -> None:
    """Makes room for a checkpoint, and deletes what interrupted saves and deletions have left."""
    make_folder(final.parent)
    for leftover in final.parent.glob(".step-*.partial"):
        _remove(leftover)
    if final.exists():
        # The search on resume has skipped it.
        aside = final.rename(final.with_name(f"{final.name}.replaced-{time.time_ns()}"))
        logger.warning("renamed %s to %s", final, aside.name)
    _partial_folder(final).mkdir()


@_errors_of_disk()
def _write_tensors(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup
) -> dict[str, str]:
    """Writes tensors, flushed to disk; collective. Returns checksums of this rank's files."""
    writer = _Writer(folder)
    dcp.save(tensors, storage_writer=writer, process_group=group)
    return writer.files.sums


@_errors_of_disk()
def _seal(final: Path, metadata: CheckpointMetadata, sums_of_ranks: list[dict[str, str]]) -> None:
    """Writes what describes the tensors' files, and gives the folder its final name."""
    partial = _partial_folder(final)
    text = metadata.model_dump_json(indent=2)
    sums = {METADATA_FILE: hashlib.sha256(text.encode()).hexdigest()}
    for own in sums_of_ranks:
        sums |= own
    for name, contents in ((METADATA_FILE, text), (SUMS_FILE, sums_text(sums))):
        file = partial / name
        with named_errors(file):
            write_flushed(file, contents.encode())
    rename_complete(partial, final)


def sums_text(sums: Mapping[str, str]) -> str:
    """Returns the contents of `SHA256SUMS`, from checksums by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


class _Writer(filesystem.FileSystemWriter):
    """Writes a file per rank, and the index on the coordinator, all flushed and hashed."""

    def __init__(self, folder: Path) -> None:
        # Copy-ahead would wait for the stream of device 0, on which training runs, or create a CUDA
        # context there on every rank.
        super().__init__(folder, sync_files=True, overwrite=False, per_thread_copy_ahead=0)
        self.fs = self.files = _HashedFiles()

    def storage_meta(self) -> StorageMeta:
        # DCP's version contains the folder, which is renamed later.
        return StorageMeta(save_id=self.save_id)


class _HashedFiles(filesystem.FileSystem):
    """Files, and checksums of what was written, whatever a disk makes of it."""

    def __init__(self) -> None:
        self.sums: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        file = Path(path)
        with named_errors(file), _HashedFile(file, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:  # torch.save hides an OSError behind it
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        # DCP renames the index.
        self.sums[file.name.removesuffix(".tmp")] = stream.digest.hexdigest()


class _HashedFile(io.FileIO):
    """Not buffered: DCP flushes a file to disk before it closes it."""

    def __init__(self, file: Path, mode: str) -> None:
        super().__init__(file, mode)
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        self.digest.update(rest)
        while rest:
            rest = rest[super().write(rest) :]
        return num_bytes


# Folders.
def step_of(path: Path) -> int:
    """The step in the name of a complete checkpoint's folder; -1 for another name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like complete checkpoints, newest first."""
    try:
        entries = list(folder.iterdir())  # `glob` would find nothing where a disk fails
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(str(error)) from error
    found = [path for path in entries if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def _partial_folder(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _remove(folder: Path) -> None:
    """Deletes a folder of files; only logs an error, and the next save tries again."""
    try:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    except OSError as error:
        logger.warning("could not delete an older checkpoint, or what is left of one: %s", error)
