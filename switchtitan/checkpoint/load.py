"""Find, verify and load checkpoints, on any number of ranks. No code of a file runs."""

import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, filesystem, metadata

from switchtitan.checkpoint.config import RESUME_AUTO, RESUME_NEVER, CheckpointConfig
from switchtitan.checkpoint.save import (
    CHECKPOINTS_FOLDER,
    FORMAT_VERSION,
    METADATA_FILE,
    OPTIMIZER,
    SUMS_FILE,
    TENSOR_FILES,
    CheckpointMetadata,
    CheckpointTensors,
    list_step_folders,
    sums_text,
)
from switchtitan.config import flatten
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError, CheckpointFormatError, abbreviate
from switchtitan.files import file_inside, sha256_of_file
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

_SUMS_LINE = re.compile(rf"([0-9a-f]{{64}})  ({TENSOR_FILES}|{METADATA_FILE})\n")
_READABLE = {
    *((metadata.__name__, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")),
    (filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""(module, name) of all that torch's index consists of, except dtypes. Exact: a prefix would allow
("torch.distributed.checkpoint.filesystem", "os.system")."""


# Finding.
def find_checkpoint(folder: Path, config: CheckpointConfig) -> Path | None:
    """Returns the checkpoint that a run resumes from; None means a new run. `folder` has the run's
    own checkpoints; need not exist. Raises a CheckpointError if the given checkpoint or initial
    weights are missing or damaged, or all own checkpoints are, or the run would mix its checkpoints
    with those of another."""
    resume, present, found = config.resume, list_step_folders(folder), None
    continued = {os.path.realpath(path) for path in (folder, folder.parent, *present[:1])}
    key = f"[checkpoint] resume = {resume!r}"
    if resume == RESUME_AUTO or _is_fork_of(present, config.resume_path):
        found = find_latest(folder)
        if present and found is None:
            raise CheckpointError(
                f"{key}: none of the {len(present)} checkpoints in {folder} is complete (see the "
                "warnings above); move that folder away to start from scratch"
            )
    elif present and (
        resume == RESUME_NEVER or (os.path.exists(resume) and config.resume_path not in continued)
    ):
        raise CheckpointError(
            f"{key}: {folder} already holds {len(present)} checkpoints, the newest is "
            f"{present[0].name}; use another [job] output_dir, or move that folder away, or set "
            "resume = 'auto' to resume from the newest"
        )
    elif resume != RESUME_NEVER:
        try:
            found = find_given(Path(resume))
        except CheckpointError as error:
            raise type(error)(f"{key}: {error}") from error
    weights = config.initial_weights
    if found is None and weights is not None and not os.path.exists(weights):
        raise CheckpointError(f"[checkpoint] initial_weights = {weights!r}: no such file or folder")
    return found


def _is_fork_of(checkpoints: Sequence[Path], resume_path: str | None) -> bool:
    """Whether a run's newest readable checkpoint descends from what `resume_path` names."""
    for path in checkpoints:
        with suppress(CheckpointError):
            forked_from = read_metadata(path).train_state.get("forked_from")
            return forked_from is not None and forked_from == resume_path
    return False


def find_given(path: Path) -> Path:
    """Returns the complete checkpoint at `path`, or the newest one of the run or folder there.
    Raises a CheckpointError if there is none, or this version does not read its format."""
    if (path / METADATA_FILE).is_file():
        verify(path)
        return path
    if latest := find_latest(path) or find_latest(path / CHECKPOINTS_FOLDER):
        return latest
    raise CheckpointError(
        f"no complete checkpoint at {path}: expected a folder step-000001000 with {METADATA_FILE}, "
        "a folder of such folders, or a run's output folder"
    )


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None; logs why it skips one."""
    for path in list_step_folders(folder):
        try:
            verify(path)
            return path
        except CheckpointFormatError:
            raise
        except CheckpointError as error:
            logger.warning("skipping a checkpoint: %s", error)
    return None


# Verifying.
def verify(path: Path) -> CheckpointMetadata:
    """Compares all files with their checksums, which reads the full checkpoint once. Raises a
    CheckpointError that names the first problem; see `read_metadata`."""
    if not (path / SUMS_FILE).exists():
        read_metadata(path)  # earlier formats have no such file
    with _reading(path / SUMS_FILE):
        text = file_inside(path, SUMS_FILE).read_text(encoding="ascii")
    sums = {name: digest for digest, name in _SUMS_LINE.findall(text)}
    if text != sums_text(sums) or not sums.keys() >= {METADATA_FILE, ".metadata"}:
        raise CheckpointError(f"{path}: {SUMS_FILE} is corrupted")
    with ThreadPoolExecutor(4) as readers, _reading(path):  # hashlib releases the GIL
        found = readers.map(lambda name: sha256_of_file(file_inside(path, name)), sums)
        bar = progress_bar(f"verifying {path.name}", found, total=len(sums), unit="files")
        for (name, expected), digest in zip(sums.items(), bar, strict=True):
            if digest != expected:
                raise CheckpointError(f"{path}: {name} differs from its checksum in {SUMS_FILE}")
        pieces = SavedTensors(path).read_metadata().storage_data.values()
    if missing := {piece.relative_path for piece in pieces} - sums.keys():
        raise CheckpointError(f"{path}: {SUMS_FILE} lacks {', '.join(sorted(missing))}")
    return read_metadata(path)


def read_metadata(path: Path) -> CheckpointMetadata:
    """Reads a checkpoint's `metadata.json`, without comparing checksums. Raises a CheckpointError
    if it is missing or damaged, a CheckpointFormatError if this version does not read the format.
    """
    with _reading(path / METADATA_FILE):
        contents = json.loads((path / METADATA_FILE).read_bytes())
        version = contents["format_version"]
        if version == FORMAT_VERSION:
            return CheckpointMetadata.model_validate(contents)
    raise CheckpointFormatError(
        f"{path}: the checkpoint has format {version}, but this version of switchtitan reads "
        f"format {FORMAT_VERSION}; resume, evaluate or export it with the version that wrote it, "
        "or start a new run in another [job] output_dir"
    )


def check_same_run(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Compares two identities, nested mappings of plain values. Raises a CheckpointError that names
    differing keys, of a section with another `name` only that, and the fix."""
    before, now, absent = flatten(saved), flatten(current), "(absent)"
    renamed = [key for key in before if key.endswith(".name") and before[key] != now.get(key)]
    sections = tuple(key.removesuffix("name") for key in renamed)
    differences = "".join(
        f"\n  {key}: saved with {before.get(key, absent)!r}, now {now.get(key, absent)!r}"
        for key in {**before, **now}
        if before.get(key, absent) != now.get(key, absent)
        and (key in renamed or not key.startswith(sections))
    )
    if differences:
        raise CheckpointError(
            f"the checkpoint belongs to another run:{differences}\n"
            "set these keys to what was saved, or start a new run in another [job] output_dir"
        )


# Loading what is verified.
def restore(checkpoint: Path, tensors: CheckpointTensors, world: World) -> None:
    """Loads model and optimizer from a checkpoint of any number of ranks; collective."""
    collected = tensors()
    world.together(lambda: load_tensors_(checkpoint, collected))
    own = {name: tensor for name, tensor in collected.items() if name.startswith(OPTIMIZER)}
    tensors.optimizer.load_state_dict({name[len(OPTIMIZER) :]: own[name] for name in own})


def load_tensors_(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fills all of a checkpoint's `tensors` in place; DTensors may be sharded differently. Raises a
    CheckpointError before any tensor changes, if names, shapes or dtypes differ."""
    checkpoint = SavedTensors(path)
    saved, expected = (
        {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in given.items()}
        for given in (checkpoint.on_meta, tensors)
    )
    differing = [
        f"{name} (saved: {saved.get(name)}, expected: {expected.get(name)})"
        for name in sorted({*saved, *expected})
        if saved.get(name) != expected.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} does not fit this run: it differs in {abbreviate(differing)}. Use the "
            "configuration it was saved with, or start a new run in another [job] output_dir"
        )
    checkpoint.fill_(tensors)


class SavedTensors(filesystem.FileSystemReader):
    """The tensors of a checkpoint. Its index, whose reading takes longer than that of most tensors,
    is read once; tensors are read with `torch.load(weights_only=True)`, as torch does."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        return self._index

    @cached_property
    def _index(self) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index: metadata.Metadata = _IndexUnpickler(file).load()
        for piece in index.storage_data.values():
            if not re.fullmatch(TENSOR_FILES, piece.relative_path):
                raise ValueError(f"its index lists {piece.relative_path!r}")
        return index

    @cached_property
    def on_meta(self) -> dict[str, Tensor]:
        """All tensors by name, on the meta device."""
        with _reading(Path(self.path)):
            saved: dict[str, Any] = self._index.state_dict_metadata
            return {
                name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                for name, entry in saved.items()
            }

    def fill_(self, tensors: Mapping[str, Tensor]) -> None:
        """Fills tensors by name in place."""
        with _reading(Path(self.path)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is .*single process")
            dcp.load(dict(tensors), storage_reader=self, no_dist=True)  # no joint planning

    def read_full(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns full tensors by name, on the CPU."""
        with _reading(Path(self.path)):
            tensors = {name: torch.empty_like(self.on_meta[name], device="cpu") for name in names}
        self.fill_(tensors)
        return tensors

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Returns rows of a tensor, on the CPU; reads only the saved shards that hold them."""
        saved = self.on_meta[name]
        into = torch.empty(len(rows), *saved.shape[1:], dtype=saved.dtype)
        first = torch.Size([rows.start, *[0] * (into.ndim - 1)])
        place = metadata.ChunkStorageMetadata(first, into.shape)
        # As a DTensor, it says which part is here (torch.distributed._checkpointable).
        sharded = torch.empty((), dtype=saved.dtype).expand(saved.shape)
        sharded.__create_chunk_list__ = lambda: [place]  # type: ignore[attr-defined]
        sharded.__get_tensor_shard__ = lambda index: into  # type: ignore[attr-defined]
        self.fill_({name: sharded})
        return into


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of torch's index and no others, so that a file cannot run code.

    A crafted file can still set attributes of these classes in this process.
    """

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in _READABLE and not is_dtype:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises a `CheckpointError` for whatever is wrong with a file: readers raise many kinds."""
    try:
        yield
    except CheckpointError:
        raise
    except (Exception, CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause, _ = next(iter(error.failures.values()))
        reason = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        if isinstance(cause, pickle.UnpicklingError):
            reason = f"holds more than tensors, which was not loaded; do not trust it ({reason})"
        raise CheckpointError(f"{path}: {reason}") from error
