"""Names, metadata and checksums of checkpoints, and the search for the one to resume from.

    <output_dir>/checkpoints/step-000001000/
        metadata.json       format, step, training state, the run's identity and configuration
        .metadata           dtype, shape and pieces of every tensor (torch.distributed.checkpoint)
        __<rank>_0.distcp   the pieces that a rank wrote
        SHA256SUMS          of the files above; `sha256sum -c SHA256SUMS` checks them too

The folder is named `.step-000001000.partial` until it is complete, and while it is deleted.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from switchtitan.checkpoint.config import RESUME_AUTO, RESUME_NEVER, CheckpointConfig
from switchtitan.config import flatten
from switchtitan.errors import CheckpointError, CheckpointFormatError
from switchtitan.files import exists, file_inside, sha256_of_file
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
"""The folder of checkpoints in a run's output folder."""
METADATA_FILE = "metadata.json"
TENSORS_INDEX_FILE = ".metadata"
SUMS_FILE = "SHA256SUMS"
FORMAT_VERSION = 5
"""Earlier ones have an index of their own instead of torch's, and other checksums."""

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_CHECKED_FILE = r"__\d+_\d+\.distcp|\.metadata|metadata\.json"
_SUMS_LINE = re.compile(rf"^([0-9a-f]{{64}})  ({_CHECKED_FILE})$", re.MULTILINE)
_OWN_FILE = re.compile(rf"{_CHECKED_FILE}|{SUMS_FILE}|\.metadata\.tmp")
_NUM_READERS = 4
_ABSENT = "(absent)"


def step_folder_name(step: int) -> str:
    return f"step-{step:09d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a complete checkpoint's folder; None for another name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def list_step_folders(folder: Path) -> list[Path]:
    """The folders in `folder` that are named like complete checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def is_own_file(name: str) -> bool:
    """Whether a file of this name in a checkpoint's folder is part of the checkpoint."""
    return _OWN_FILE.fullmatch(name) is not None


class CheckpointMetadata(BaseModel):
    """The contents of `metadata.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    step: int = Field(ge=0)
    """Optimizer steps done."""
    train_state: dict[str, JsonValue]
    """The trainer's state, e.g. the number of tokens seen."""
    identity: dict[str, JsonValue]
    """The values that may not change on resume: model, method, corpus."""
    run: dict[str, JsonValue]
    """For the reader: the configuration, the corpus, the time."""
    versions: dict[str, str]
    """Versions of the code that wrote it."""

    @property
    def config(self) -> str:
        """The configuration of the run that saved the checkpoint, as TOML."""
        return str(self.run["config"])

    def identity_value(self, section: str, key: str) -> JsonValue:
        """Returns one value of the identity.

        Raises:
            CheckpointError: if the checkpoint does not state it.
        """
        values = self.identity.get(section)
        if not isinstance(values, dict) or key not in values:
            raise CheckpointError(
                f"{METADATA_FILE} of step {self.step}: identity.{section}.{key} is missing"
            )
        return values[key]

    def identity_number(self, section: str, key: str) -> int:
        """Returns one value of the identity, an integer.

        Raises:
            CheckpointError: if the checkpoint does not state it.
        """
        number = self.identity_value(section, key)
        if not isinstance(number, int):
            raise CheckpointError(
                f"{METADATA_FILE} of step {self.step}: identity.{section}.{key} = {number!r}: "
                "expected an integer"
            )
        return number


class _Header(BaseModel):
    """What `metadata.json` of every format states."""

    format_version: int
    versions: dict[str, str] = {}


def read_metadata(path: Path) -> CheckpointMetadata:
    """Reads `metadata.json` of the checkpoint at `path`, without comparing checksums.

    Raises:
        CheckpointFormatError: if this version does not read the checkpoint's format.
        CheckpointError: if it is missing or damaged.
    """
    with _reading(path, METADATA_FILE):
        contents = file_inside(path, METADATA_FILE).read_bytes()
        header = _Header.model_validate_json(contents)
        if header.format_version == FORMAT_VERSION:
            return CheckpointMetadata.model_validate_json(contents)
    own = header.versions.get("switchtitan", "of the version that wrote it")
    raise CheckpointFormatError(
        f"{path}: the checkpoint has format {header.format_version}, but this version of "
        f"switchtitan reads format {FORMAT_VERSION}; resume, evaluate or export it with "
        f"switchtitan {own}, or start a new run in another [job] output_dir"
    )


def sums_text(sums: Mapping[str, str]) -> str:
    """Returns the contents of `SHA256SUMS` for checksums by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(path: Path) -> dict[str, str]:
    """Reads the checksums of the checkpoint at `path`, by file name.

    Raises:
        CheckpointFormatError: if this version does not read the checkpoint's format.
        CheckpointError: if they are missing or damaged.
    """
    with _reading(path, SUMS_FILE):
        file = file_inside(path, SUMS_FILE)
        if not file.exists() and (path / METADATA_FILE).exists():
            read_metadata(path)  # earlier formats have no such file
        text = file.read_text(encoding="ascii")
    sums = {name: digest for digest, name in _SUMS_LINE.findall(text)}
    if text != sums_text(sums) or not sums.keys() >= {METADATA_FILE, TENSORS_INDEX_FILE}:
        raise CheckpointError(f"{path}: {SUMS_FILE} is corrupted")
    return sums


def verify(path: Path) -> CheckpointMetadata:
    """Compares all files with their checksums, which reads the full checkpoint once.

    Raises:
        CheckpointFormatError: if this version does not read the checkpoint's format.
        CheckpointError: names the first problem.
    """
    sums = read_sums(path)
    with ThreadPoolExecutor(_NUM_READERS) as readers:  # hashlib releases the GIL
        found = readers.map(lambda name: _sha256(path, name), sums)
        bar = progress_bar(f"verifying {path.name}", found, total=len(sums), unit="files")
        for (name, expected), digest in zip(sums.items(), bar, strict=True):
            if digest != expected:
                raise CheckpointError(
                    f"{path}: {name} is corrupted: its checksum differs from that in {SUMS_FILE}"
                )
    metadata = read_metadata(path)
    if step_of(path) not in (None, metadata.step):
        raise CheckpointError(
            f"{path}: {METADATA_FILE} is of step {metadata.step}; if the folder was renamed, "
            f"rename it to {step_folder_name(metadata.step)}"
        )
    return metadata


def _sha256(path: Path, name: str) -> str:
    with _reading(path, name):
        return sha256_of_file(file_inside(path, name))


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """Raises a `CheckpointError` if the checkpoint's file cannot be read or parsed."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise CheckpointError(f"{path}: cannot read {name}: {reason}") from error


def find_latest(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint in `folder`, or None. Compares checksums.

    Raises:
        CheckpointFormatError: if this version does not read the newest checkpoint's format.
    """
    return next(filter(is_complete, list_step_folders(folder)), None)


def is_complete(path: Path) -> bool:
    """Whether `verify` finds no problem; logs what it finds.

    Raises:
        CheckpointFormatError: if this version does not read the checkpoint's format.
    """
    try:
        verify(path)
    except CheckpointFormatError:
        raise
    except CheckpointError as error:
        logger.warning("skipping an incomplete checkpoint: %s", error)
        return False
    return True


def find_given(path: Path) -> Path:
    """Returns the complete checkpoint at `path`, or the newest one of the run or folder at `path`.

    Raises:
        CheckpointFormatError: if this version does not read its format.
        CheckpointError: if there is none.
    """
    if (path / METADATA_FILE).is_file():
        verify(path)
        return path
    for folder in (path, path / CHECKPOINTS_FOLDER):
        if latest := find_latest(folder):
            return latest
    raise CheckpointError(
        f"no complete checkpoint at {path}: expected a folder step-000001000 with {METADATA_FILE}, "
        "a folder of such folders, or a run's output folder"
    )


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """Returns the checkpoint for `resume` (see `CheckpointConfig.resume`); None means a new run.

    Args:
        folder: the run's own checkpoints; need not exist.

    Raises:
        CheckpointError: if `resume` is a path without a complete checkpoint, or "auto" and all
            checkpoints are damaged, or the run would mix its checkpoints with those of another.
    """
    present = list_step_folders(folder)
    if resume != RESUME_AUTO:
        _check_not_mixed(folder, present, resume)
        return None if resume == RESUME_NEVER else find_given(Path(resume))
    latest = find_latest(folder)
    if latest is None and present:
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: none of the {len(present)} checkpoints in {folder} "
            "is complete (see the warnings above); move that folder away to start from scratch"
        )
    return latest


def _check_not_mixed(folder: Path, present: list[Path], resume: str) -> None:
    given, own = Path(resume).resolve(), folder.resolve()
    continued = {own, own.parent, *(path.resolve() for path in present[:1])}
    if present and (resume == RESUME_NEVER or given not in continued):
        raise CheckpointError(
            f"[checkpoint] resume = {resume!r}: {folder} already holds {len(present)} checkpoints, "
            f"the newest is {present[0].name}; use another [job] output_dir, or move that folder "
            "away, or set resume = 'auto' to resume from the newest"
        )


def check_given_paths(folder: Path, config: CheckpointConfig) -> None:
    """Checks that the given paths exist; cheap enough to call before any work.

    Args:
        folder: the run's own checkpoints; if there are any, initial weights are not read.

    Raises:
        CheckpointError: names a path that will be read and does not exist.
    """
    given = {"resume": config.resume, "initial_weights": config.initial_weights}
    if config.resume in (RESUME_AUTO, RESUME_NEVER):
        del given["resume"]
    if list_step_folders(folder):
        del given["initial_weights"]
    for key, path in given.items():
        if path is not None and not exists(Path(path)):
            raise CheckpointError(f"[checkpoint] {key} = {path!r}: no such file or folder")


def check_same_run(saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Compares two identities, nested mappings of plain values.

    Raises:
        CheckpointError: names every differing key by its dotted path, with both values and the fix.
    """
    before, now = flatten(saved), flatten(current)
    differences = "".join(
        f"\n  {key}: saved with {before.get(key, _ABSENT)!r}, now {now.get(key, _ABSENT)!r}"
        for key in {**before, **now}
        if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    )
    if differences:
        raise CheckpointError(
            f"the checkpoint belongs to another run:{differences}\n"
            "set these back to resume that run, or start a new one in another [job] output_dir"
        )
