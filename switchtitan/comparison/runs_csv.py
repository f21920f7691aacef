"""The CSV file of a comparison's runs: written with each report, and read as finished runs.

With such a file a comparison continues on another machine, without the folders of its runs.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from switchtitan.comparison.effective_rank import effective_rank
from switchtitan.comparison.results import RunResult
from switchtitan.errors import ConfigError

_FIGURES = {
    "steps": ("step",),
    "tokens": ("tokens_seen",),
    "validation_loss": ("loss/validation",),
    "test_loss": ("loss/test",),
    "validation_bits_per_byte": ("bits_per_byte/validation",),
    "test_bits_per_byte": ("bits_per_byte/test",),
    "tokens_per_s": ("throughput/tokens_per_s",),
    "peak_gib": ("memory/peak_gib",),
    "state_gib": ("memory/state_gib",),
    "num_trainable": ("num_parameters", "trainable"),
    "device": ("device",),
    "cpu_capability": ("cpu_capability",),
    "num_threads": ("num_threads",),
    "torch": ("versions", "torch"),
    "commit": ("commit",),
    "corpus": ("corpus", "name"),
    "corpus_fingerprint": ("corpus", "fingerprint"),
}
"""Columns, and where a run's `results.json` has their values."""


class RunKey(NamedTuple):
    """What identifies a run on any machine."""

    config_sha256: str
    seed: int


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


_Number = Annotated[float | None, BeforeValidator(_none_if_empty)]
_Count = Annotated[int | None, Field(ge=0), BeforeValidator(_none_if_empty)]
_Text = Annotated[str | None, BeforeValidator(_none_if_empty)]


class _Line(BaseModel):
    """A line of the file; the columns of tuned keys are for people."""

    model_config = ConfigDict(extra="ignore")

    seed: int = Field(ge=0)
    diverged: bool
    config_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    effective_rank: _Number
    steps: int = Field(ge=1)
    tokens: _Count
    validation_loss: _Number
    test_loss: _Number
    validation_bits_per_byte: _Number
    test_bits_per_byte: _Number
    tokens_per_s: _Number
    peak_gib: _Number
    state_gib: _Number
    num_trainable: _Count
    device: _Text
    cpu_capability: _Text
    num_threads: _Count
    torch: _Text
    commit: _Text
    corpus: str = Field(min_length=1)
    corpus_fingerprint: str = Field(min_length=1)


def run_record(stage: str, result: RunResult, axes: Sequence[str]) -> dict[str, object]:
    """Returns the columns of a finished run: tuned keys, results, machine, code and corpus."""
    run, figures = result.run, result.figures
    record: dict[str, object] = {"stage": stage, "row": run.row}
    record |= {key: run.value(key) for key in dict.fromkeys(axes)}
    record |= {"seed": run.seed, "diverged": result.has_diverged}
    record |= {column: _find(figures, path) for column, path in _FIGURES.items()}
    # A diverged run's results have no losses.
    record |= {"validation_loss": result.validation_loss, "test_loss": result.test_loss}
    record["effective_rank"] = effective_rank(result)
    record["config_sha256"] = result.config_sha256
    return record


def runs_csv(records: Iterable[Mapping[str, object]], axes: Sequence[str]) -> str:
    """Returns one CSV line per finished run, from their columns."""
    stream = io.StringIO()
    tuned = dict.fromkeys(axes)
    figures = [*_FIGURES, "effective_rank", "config_sha256"]
    columns = ["stage", "row", *tuned, "seed", "diverged", *figures]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return stream.getvalue()


def read_finished_runs(*files: Path) -> dict[RunKey, dict[str, Any]]:
    """Reads the finished runs of CSV files that reports have written.

    Returns:
        the contents of their `results.json`, as far as the files have them.

    Raises:
        ConfigError: if a file cannot be read, a line is no run, or two lines have other results of
            the same run.
    """
    runs: dict[RunKey, tuple[str, dict[str, Any]]] = {}
    for file in files:
        for place, key, figures in _read_file(file):
            first, known = runs.setdefault(key, (place, figures))
            if known != figures:
                paths = {name: (name,) for name in ("diverged", "effective_rank")} | _FIGURES
                differing = [
                    column
                    for column, path in paths.items()
                    if _find(known, path) != _find(figures, path)
                ]
                raise ConfigError(
                    f"{place}: an earlier line ({first}) has the same configuration and seed, and "
                    f"another {', '.join(differing)}; keep one of them"
                )
    return {key: figures for key, (_, figures) in runs.items()}


def _read_file(file: Path) -> Iterator[tuple[str, RunKey, dict[str, Any]]]:
    """Yields each run of a file, with its place there."""
    place = f"finished_runs = {str(file)!r}"
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = reader.fieldnames or []
            if missing := [name for name in _Line.model_fields if name not in columns]:
                raise ConfigError(
                    f"{place}: has no column {', '.join(missing)}; expected the runs.csv of a "
                    "comparison's report, written by this version"
                )
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"{place}: cannot be read ({error}); expected the runs.csv of a comparison's report"
        ) from error
    for number, line in lines:
        yield f"{place}, line {number}", *_parse(line, f"{place}, line {number}")


def _parse(line: dict[str, str], place: str) -> tuple[RunKey, dict[str, Any]]:
    try:
        parsed = _Line.model_validate(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        column = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{place}: {column} = {first['input']!r}: {first['msg']}; restore the line, or remove "
            "it, so that the run is trained again"
        ) from error
    losses = (parsed.validation_loss, parsed.test_loss)
    if not parsed.diverged and not all(loss is not None and math.isfinite(loss) for loss in losses):
        raise ConfigError(
            f"{place}: validation_loss and test_loss of a run that has not diverged: expected "
            "finite numbers; remove the line, so that the run is trained again"
        )
    if not parsed.diverged and parsed.tokens is None:
        raise ConfigError(
            f"{place}: tokens = '' of a run that has not diverged: expected the number of its "
            "training tokens; restore it, or remove the line, so that the run is trained again"
        )
    figures: dict[str, Any] = {"effective_rank": parsed.effective_rank}
    if parsed.diverged:
        figures["diverged"] = True
    for column, path in _FIGURES.items():
        _insert(figures, path, getattr(parsed, column))
    return RunKey(parsed.config_sha256, parsed.seed), figures


def _find(figures: Mapping[str, Any], path: tuple[str, ...]) -> object:
    value: Any = figures
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _insert(figures: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        figures = figures.setdefault(name, {})
    figures[path[-1]] = value
