"""The finished runs of a comparison: from their folders, and from the CSV files of reports.

With a `runs.csv` a comparison continues on another machine, without the folders of its runs.
"""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from switchtitan.checkpoint import find_given
from switchtitan.comparison.plan import Run
from switchtitan.config import flatten
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import write_atomically
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.observability import RESULTS_FILE
from switchtitan.spectra.spectrum import summarize
from switchtitan.spectra.weight_change import checkpoint_spectra
from switchtitan.training.describe import CONFIG_FILE

_COLUMNS = {
    "step": "steps",
    "tokens_seen": "tokens",
    "loss/validation": "validation_loss",
    "loss/test": "test_loss",
    "bits_per_byte/validation": "validation_bits_per_byte",
    "bits_per_byte/test": "test_bits_per_byte",
    "throughput/tokens_per_s": "tokens_per_s",
    "memory/peak_gib": "peak_gib",
    "memory/state_gib": "state_gib",
    "num_parameters.trainable": "num_trainable",
    "versions.torch": "torch",
    "corpus.name": "corpus",
    "corpus.fingerprint": "corpus_fingerprint",
}
"""Key of a run's `results.json` -> column of `runs.csv`; other keys have the same name."""
_KEYS_OF_A_MACHINE = {"job": {"name", "output_dir"}, "data": {"cache_dir"}}
"""Keys that change no result: names and folders."""
_FOR_PEOPLE = {"stage": True, "row": True}
"""Columns that say nothing about a result."""
DEFAULTS_VERSION = 1
"""Increase it when the default of a key changes: earlier runs had the default of then."""

RunKey = tuple[str, int]
"""What identifies a run on any machine: the SHA-256 of its configuration, and its seed."""


class RunResult(BaseModel):
    """A finished run: a line of `runs.csv`. Figures that are not known are None."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    stage: str = ""
    """For people, as `row`: what the run was trained for."""
    row: str = ""
    seed: int = Field(ge=0)
    diverged: bool = False
    """Whether gradients or a loss are not finite."""
    steps: int = Field(ge=1)
    tokens: int | None = Field(default=None, ge=0)
    validation_loss: float = math.inf
    """In nats per token; inf if the run diverged."""
    test_loss: float = math.inf
    validation_bits_per_byte: float | None = None
    test_bits_per_byte: float | None = None
    tokens_per_s: float | None = None
    peak_gib: float | None = None
    state_gib: float | None = None
    num_trainable: int | None = None
    device: str | None = None
    cpu_capability: str | None = None
    num_threads: int | None = None
    torch: str | None = None
    commit: str | None = None
    corpus: str = Field(min_length=1)
    corpus_fingerprint: str = Field(min_length=1)
    effective_rank: float | None = None
    """Effective rank of the linear layers' change since step 0, averaged over layers."""
    config_sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value not in ("", None)}

    @model_validator(mode="after")
    def _check_losses(self) -> "RunResult":
        losses = (self.validation_loss, self.test_loss)
        if not self.diverged and not all(map(math.isfinite, losses)):
            raise ValueError("expected finite losses of a run that has not diverged")
        return self


def config_sha256(config: JobConfig) -> str:
    """Returns a checksum of a run's configuration, without its name and folders.

    Runs with the same checksum compute the same, on the same corpus and with the same code. It
    covers the keys that differ from their defaults, so that a later version with more keys knows
    the runs of an earlier one.
    """
    contents: dict[str, Any] = {
        section: {
            key: value
            for key, value in values.model_dump(mode="json").items()
            if key not in _KEYS_OF_A_MACHINE.get(section, ())
            and (key == "name" or not values.is_default(key))
        }
        for section, values in config
    }
    contents["defaults"] = DEFAULTS_VERSION
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def read_folder(run: Run) -> RunResult | None:
    """Returns the result in a run's folder, None if it is not finished.

    Computes the effective rank of the last checkpoint, which takes a while.

    Raises:
        ConfigError: if the folder contains a run with another configuration.
    """
    if not (run.folder / CONFIG_FILE).exists():
        return None
    config = run.config()
    digest = config_sha256(config)
    found = parse_arguments(["--config", str(run.folder / CONFIG_FILE)], num_ranks=1)
    if config_sha256(found) != digest:
        raise ConfigError(
            f"{run.folder}: this run has another configuration than the comparison; choose another "
            "output_dir, or delete the folder to train it again"
        )
    file = run.folder / RESULTS_FILE
    if not file.exists():
        return None
    results = flatten(json.loads(file.read_text(encoding="utf-8")))
    figures = {_COLUMNS.get(key, key): value for key, value in results.items()}
    losses: list[Any] = [figures.get("validation_loss"), figures.get("test_loss")]
    has_diverged = any(loss is not None and not math.isfinite(loss) for loss in losses)
    if figures.get("diverged") or has_diverged:
        figures |= {"diverged": True, "validation_loss": math.inf, "test_loss": math.inf}
    elif figures["steps"] != config.training.steps:
        return None
    else:
        with suppress(CheckpointError):  # its checkpoints are gone
            spectra = checkpoint_spectra(find_given(run.folder))
            figures["effective_rank"] = summarize(spectra).effective
    return RunResult.model_validate(figures | {"seed": run.seed, "config_sha256": digest})


def write_csv(
    file: Path, stages: Mapping[str, Mapping[Run, RunResult]], others: Iterable[RunResult] = ()
) -> None:
    """Writes a line for each finished run of each stage, with the tuned keys for people.

    Args:
        others: results that the file has already, of runs that are in no stage now.
    """
    lines = [
        {**result.model_dump(), "stage": stage, "row": run.row, **dict(run.tuned)}
        for stage, of_stage in stages.items()
        for run, result in of_stage.items()
    ]
    lines += [result.model_dump() for result in others]
    tuned = dict.fromkeys(key for of in stages.values() for run in of for key, _ in run.tuned)
    stream = io.StringIO()
    figures = [name for name in RunResult.model_fields if name not in _FOR_PEOPLE]
    columns = [*_FOR_PEOPLE, *tuned, *figures]
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(file, stream.getvalue())


def read_csv(files: Sequence[Path]) -> dict[RunKey, RunResult]:
    """Reads the finished runs of CSV files that reports have written.

    Raises:
        ConfigError: if a file cannot be read, a line is no run, or two lines have other results of
            the same run.
    """
    runs: dict[RunKey, RunResult] = {}
    for file in files:
        try:
            lines = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        except (OSError, ValueError, csv.Error) as error:
            raise ConfigError(f"{file}: expected the runs.csv of a report: {error}") from error
        for number, line in enumerate(lines, start=2):
            place = f"{file}, line {number}"
            try:
                result = RunResult.model_validate(line)
            except ValidationError as error:
                raise ConfigError(f"{place}: is no finished run of a report: {error}") from error
            known = runs.setdefault((result.config_sha256, result.seed), result)
            if known.model_dump(exclude=_FOR_PEOPLE) != result.model_dump(exclude=_FOR_PEOPLE):
                raise ConfigError(
                    f"{place}: an earlier line has another result of the same configuration and "
                    "seed; keep one of them"
                )
    return runs
