"""Reads what a run left in its folder. What is missing or damaged is noted, not an error."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from switchtitan.config.toml_files import parse_toml
from switchtitan.config.toml_text import flatten, toml_value
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import exists
from switchtitan.observability import RESULTS_FILE, TENSORBOARD_FOLDER
from switchtitan.observability.curves import Curve, read_curves
from switchtitan.observability.profile_report import SUMMARY_FILE
from switchtitan.spectra.spectra_files import SPECTRA_FOLDER, read_spectra
from switchtitan.spectra.spectrum import Spectra
from switchtitan.training.describe import CONFIG_FILE, newest_config_file

_MAX_FILE_BYTES = 1 << 24
_MAX_VALUE_LENGTH = 300
"""Characters of a configuration's value that are shown."""
_RECORD_HEADER = struct.Struct("<QI")
"""Of a record of an event file: length and checksum; the data and their checksum follow."""
_CHECKSUM_BYTES = 4
ModelT = TypeVar("ModelT")
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
"""A number that can be converted to a float."""


class _Parsed(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class NumParameters(_Parsed):
    """Sizes of a model."""

    trainable: Count
    frozen: Count
    buffers: Count = 0


class Results(_Parsed):
    """What a report shows of `results.json`."""

    step: Count
    diverged: bool = False
    tokens_seen: Count | None = None
    validation_loss: float | None = Field(None, alias="loss/validation")
    test_loss: float | None = Field(None, alias="loss/test")
    validation_bits_per_byte: float | None = Field(None, alias="bits_per_byte/validation")
    test_bits_per_byte: float | None = Field(None, alias="bits_per_byte/test")
    tokens_per_s: float | None = Field(None, alias="throughput/tokens_per_s")
    wall_time_s: float | None = Field(None, alias="throughput/wall_time_s")
    peak_memory_gib: float | None = Field(None, alias="memory/peak_gib")
    compute_dtype: str | None = None
    device: str | None = None
    num_ranks: Count | None = None
    commit: str | None = None
    num_parameters: NumParameters | None = None


class RegionTimes(_Parsed):
    """A region in a trace, per step."""

    num_calls: Count
    host_ms: float
    device_ms: float


class OperationTimes(_Parsed):
    """An operation in a trace."""

    name: str
    num_calls: Count
    self_ms: float
    share: float


class RankProfile(_Parsed):
    """The summary of one rank's trace."""

    rank: Count
    num_steps: Count
    step_ms: float
    regions: dict[str, RegionTimes]
    operations: list[OperationTimes]


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run."""

    folder: Path
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By metric; empty if none was reported yet."""
    results: Results | None = None
    """None if the run is not finished."""
    config: Mapping[str, str] = field(default_factory=dict)
    """Values as in TOML, by dotted key."""
    spectra: Mapping[int, Spectra] = field(default_factory=dict)
    """Measured spectra by step."""
    profile: tuple[RankProfile, ...] = ()
    """Summaries of traces by rank."""
    notes: tuple[str, ...] = ()
    """What is missing or damaged."""


def read_run(folder: Path) -> RunRecord:
    """Reads a run's output folder.

    Raises:
        ConfigError: if there is no such folder, or it is no run's.
    """
    if not (exists(folder) and folder.is_dir()):
        raise ConfigError(f"{folder}: no such folder; expected the output folder of a run")
    notes: list[str] = []
    curves = _read_curves(folder, notes)
    config = _read_config(folder, notes)
    results = _read_json(folder / RESULTS_FILE, Results, notes)
    if not curves and not config and results is None:
        raise ConfigError(
            f"{folder}: is not the folder of a run or of a comparison, since it has no "
            f"{CONFIG_FILE}, no {RESULTS_FILE} and no scalars in {TENSORBOARD_FOLDER}/; expected "
            "the [job] output_dir of a run"
        )
    if results is None and not (folder / RESULTS_FILE).exists():
        notes.append(
            f"no {RESULTS_FILE}: the run is not finished; its figures are the last reported ones"
        )
    if results is not None and _has_continued(results, curves):
        notes.append(
            f"{RESULTS_FILE} is of step {results.step}, after which the run continued: the figures "
            "are the last reported ones"
        )
        results = None
    profile_file = folder / TENSORBOARD_FOLDER / f"{SUMMARY_FILE}.json"
    return RunRecord(
        folder,
        curves,
        results,
        config,
        _read_spectra(folder, notes),
        tuple(_read_json(profile_file, list[RankProfile], notes) or ()),
        tuple(notes),
    )


def broken_event_files(folder: Path) -> list[str]:
    """Returns the names of TensorBoard's event files in `folder` that do not end with a record.

    Such a file is being written, its run was killed, or its disk was full or lost power.
    """
    files = sorted(folder.glob("*tfevents*")) if folder.is_dir() else []
    return [file.name for file in files if file.is_file() and _is_broken(file)]


def _is_broken(file: Path) -> bool:
    size, place = file.stat().st_size, 0
    with file.open("rb") as stream:
        while place < size:
            stream.seek(place)
            header = stream.read(_RECORD_HEADER.size)
            if len(header) < _RECORD_HEADER.size:
                return True
            length, _ = _RECORD_HEADER.unpack(header)
            if length == 0:  # zeros instead of an event
                return True
            place += _RECORD_HEADER.size + length + _CHECKSUM_BYTES
    return place > size


def _read_curves(folder: Path, notes: list[str]) -> dict[str, Curve]:
    try:
        curves = read_curves(folder)
    except ConfigError:
        curves = {}
        notes.append(
            "no curves: no step was reported yet, the event files are damaged, or [metrics] "
            "tensorboard = false"
        )
    for name in broken_event_files(folder / TENSORBOARD_FOLDER):
        notes.append(f"{name} ends within a record: points after it are missing")
    return curves


def _has_continued(results: Results, curves: Mapping[str, Curve]) -> bool:
    """Whether steps were reported after those of the results."""
    last = max((steps[-1] for steps, _ in curves.values() if steps), default=0)
    # A step that diverges is reported, and does not count.
    return last > results.step + results.diverged


def _read_config(folder: Path, notes: list[str]) -> dict[str, str]:
    """Reads the configuration of the run's last part, if it was resumed with another."""
    file, step = newest_config_file(folder)
    if not file.exists():
        notes.append(f"no {CONFIG_FILE}: the configuration is not known")
        return {}
    try:
        values = flatten(parse_toml(_text(file), str(file)))
    except (OSError, ValueError, ConfigError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    if step:
        notes.append(f"the configuration is that from step {step} on ({file.name})")
    return {key: _shortened(toml_value(value)) for key, value in values.items()}


def _read_json(file: Path, kind: type[ModelT], notes: list[str]) -> ModelT | None:
    if not file.exists():
        return None
    try:
        return TypeAdapter(kind).validate_json(_text(file))
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        reason = (
            error.errors(include_url=False)[0]["msg"]
            if isinstance(error, ValidationError)
            else error
        )
        notes.append(f"{file.name} cannot be read: {reason}")
        return None


def _read_spectra(folder: Path, notes: list[str]) -> dict[int, Spectra]:
    try:
        measured = read_spectra(folder / SPECTRA_FOLDER)
    except (CheckpointError, OSError) as error:
        notes.append(f"spectra cannot be read: {error}")
        return {}
    valid: dict[int, Spectra] = {
        step: spectra for step, spectra in measured.items() if spectra and _are_spectra(spectra)
    }
    if len(valid) < len(measured):
        notes.append(f"{len(measured) - len(valid)} files in {SPECTRA_FOLDER}/ hold no spectra")
    return valid


def _are_spectra(spectra: Spectra) -> bool:
    return all(
        values.ndim == 1
        and values.numel() > 0
        and values.is_floating_point()
        and bool(values.isfinite().all())
        and bool((values >= 0).all())
        for values in spectra.values()
    )


def _text(file: Path) -> str:
    size = file.stat().st_size
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"it has {size} bytes; expected at most {_MAX_FILE_BYTES}")
    return file.read_text(encoding="utf-8")


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 3]}..."
