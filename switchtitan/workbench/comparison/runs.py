"""The runs of a comparison: their configurations, and their results in folders and CSV files."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, computed_field

from switchtitan.checkpoint.save import CHECKPOINTS_FOLDER
from switchtitan.config import flatten
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.files import write_atomically
from switchtitan.job.config import JobConfig, parse_arguments
from switchtitan.observability import RESULTS_FILE
from switchtitan.registry import Section, toml_value
from switchtitan.training.output import CONFIG_FILE
from switchtitan.workbench.comparison.config import ComparisonConfig, RowConfig
from switchtitan.workbench.spectra.weight_change import checkpoint_spectra, mean_effective_rank

_KEYS_OF_A_MACHINE = {
    "job": {"name", "output_dir"},
    "data": {"cache_dir", "offline_dataset"},
    "checkpoint": {"resume"},
}
"""Keys that change no result: names, folders, what may replace a corpus that results name, and the
longer run that a run shares its first steps with."""


@dataclass(frozen=True)
class Run:
    """A training run."""

    row: str
    tuned: Mapping[str, float] = field(compare=False)
    """Chosen or given values of the axes, in their order."""
    seed: int
    arguments: tuple[str, ...]
    """The arguments of `switchtitan train`."""
    config: JobConfig = field(compare=False, repr=False)
    source: "Run | None" = field(default=None, compare=False, repr=False)
    """The run that it resumes from."""

    @property
    def folder(self) -> Path:
        return self.config.job.output_dir

    @property
    def can_start(self) -> bool:
        """Whether the checkpoint that it resumes from exists, if any."""
        return self.source is None or Path(self.config.checkpoint.resume).exists()


class RunResult(BaseModel):
    """A finished run: a line of `runs.csv`, or a `results.json`. Unknown figures are None."""

    model_config = ConfigDict(populate_by_name=True, frozen=True)

    row: str = ""
    """For people: a row with the same configuration uses the same run."""
    seed: int
    steps: int = Field(alias="step", ge=1)
    tokens: int | None = Field(None, alias="tokens_seen")
    validation_loss: float = Field(alias="loss/validation")
    """In nats per token, not finite if the run diverged."""
    test_loss: float = Field(alias="loss/test")
    validation_bits_per_byte: float | None = Field(None, alias="bits_per_byte/validation")
    test_bits_per_byte: float | None = Field(None, alias="bits_per_byte/test")
    tokens_per_s: float | None = Field(None, alias="throughput/tokens_per_s")
    peak_gib: float | None = Field(None, alias="memory/peak_gib")
    state_gib: float | None = Field(None, alias="memory/state_gib")
    num_trainable: int | None = Field(None, alias="num_parameters.trainable")
    device: str | None = None
    cpu_capability: str | None = None
    num_threads: int | None = None
    torch: str | None = Field(None, alias="versions.torch")
    commit: str | None = None
    corpus: str = Field(alias="corpus.name")
    corpus_fingerprint: str = Field(alias="corpus.fingerprint")
    effective_rank: float | None = None
    """Effective rank of the linear layers' change since step 0, averaged over layers."""
    config_sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def diverged(self) -> bool:
        return not (math.isfinite(self.validation_loss) and math.isfinite(self.test_loss))


def short_name(key: str) -> str:
    """Returns the name of a tuned key in tables and folders: without `optimizer.`."""
    return key.removeprefix("optimizer.")


def plan_run(
    comparison: ComparisonConfig, row: RowConfig, values: Mapping[str, float], seed: int
) -> Run:
    """Returns the run of a row with values of its tuned keys and a seed, in its own folder. Raises
    a ConfigError if the row's keys do not fit."""
    keys = row.given_values | dict(values)
    tuned = {key: keys[key] for key in comparison.axes if isinstance(keys.get(key), int | float)}
    parts = [f"{short_name(key)}-{value:g}" for key, value in tuned.items()]
    label = "-".join([*parts, f"seed-{seed}"])
    keys |= {
        "job.seed": seed,
        "job.name": f"{row.name}-{label}",
        "job.output_dir": str(comparison.output_dir / "runs" / row.name / label),
    }
    arguments = ["--config", str(comparison.config)]
    for key, value in keys.items():
        arguments += [f"--{key}", value if isinstance(value, str) else toml_value(value)]
    try:
        config = parse_arguments(arguments, num_ranks=1)
    except ConfigError as error:
        raise ConfigError(f"row {row.name}: {error}") from error
    return Run(row.name, tuned, seed, tuple(arguments), config)


def resumed_from(source: Run, run: Run) -> Run:
    """Returns a run that resumes from a longer one, where its own rate begins to fall, and computes
    the same as `run` does from the start. Raises a ConfigError if it would not."""
    config, longer = run.config, source.config
    place = f"row {run.row}: resume_from = {source.row!r}"
    alike = longer.model_copy(update={"job": config.job, "training": config.training})
    if alike != config or config.method.depends_on_length():
        raise ConfigError(
            f"{place}: expected the keys of that row but [training] steps, and a method that does "
            "not depend on the steps (for SwitchLoRA, set interval and decay = 'constant')"
        )
    schedule = config.lr_schedule
    first, step = schedule.warmup_steps, schedule.decay_start(config.training.steps)
    last = schedule.decay_start(longer.training.steps)
    interval, kept = longer.checkpoint.interval, longer.checkpoint.keep_every
    if not first < step <= last or step % interval or kept is None or step % kept:
        raise ConfigError(
            f"{place}: its learning rate falls from step {step} on; expected a step from "
            f"{first + 1} to {last}, where that row's is at its peak, and a multiple of "
            f"[checkpoint] interval = {interval} and keep_every = {kept}; change these, or "
            "[lr_schedule] decay_ratio"
        )
    path = str(source.folder / CHECKPOINTS_FOLDER / f"step-{step:09d}")
    checkpoint = config.checkpoint.model_copy(update={"resume": path})
    return replace(
        run,
        arguments=(*run.arguments, "--checkpoint.resume", path),
        config=config.model_copy(update={"checkpoint": checkpoint}),
        source=source,
    )


def config_sha256(config: JobConfig) -> str:
    """Returns a checksum of a run's configuration, without its name, folders and `resume`.

    Runs with the same checksum compute the same, on the same corpus and with the same code. It
    covers the keys that differ from their first defaults, so that a later version with more keys,
    or other defaults, knows the runs of an earlier one.
    """
    contents: dict[str, Any] = {
        section: {
            key: value
            for key, value in values.model_dump(mode="json").items()
            if key not in _KEYS_OF_A_MACHINE.get(section, ())
            and (key == "name" or not _is_first_default(values, key))
        }
        for section, values in config
    }
    contents["defaults"] = 1  # in all published checksums
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _is_first_default(section: Section, key: str) -> bool:
    former = section.former_defaults
    return getattr(section, key) == former[key] if key in former else section.is_default(key)


def read_folder(run: Run) -> RunResult | None:
    """Returns the result in a run's folder, None if it is not finished. Raises a ConfigError if the
    folder contains a run with another configuration.

    Computes the effective rank of the last checkpoint, which takes a while.
    """
    saved, file = run.folder / CONFIG_FILE, run.folder / RESULTS_FILE
    if not saved.exists():
        return None
    digest = config_sha256(run.config)
    if config_sha256(parse_arguments(["--config", str(saved)], num_ranks=1)) != digest:
        raise ConfigError(
            f"{run.folder}: this run has another configuration than the comparison; choose another "
            "output_dir, or delete the folder to train it again"
        )
    if not file.exists():
        return None
    figures = flatten(json.loads(file.read_text(encoding="utf-8")))
    if figures.get("diverged"):
        figures |= {"loss/validation": math.inf, "loss/test": math.inf}
    elif figures["step"] != run.config.training.steps:
        return None
    result = RunResult.model_validate(
        figures | {"row": run.row, "seed": run.seed, "config_sha256": digest}
    )
    if result.diverged:
        return result
    with suppress(CheckpointError):  # its checkpoints are gone
        _, spectra = checkpoint_spectra(run.folder)
        result = result.model_copy(update={"effective_rank": mean_effective_rank(spectra)})
    return result


def write_csv(file: Path, results: Mapping[Run, RunResult]) -> None:
    """Writes a line for each finished run, with its tuned keys for people. Other results in it
    stay, e.g. of values that are no longer declared."""
    tuned = [key for run in results for key in run.tuned]
    lines: list[dict[str, Any]] = [
        {**result.model_dump(), "row": run.row, **run.tuned} for run, result in results.items()
    ]
    written = {line["config_sha256"] for line in lines}
    before = _lines(file) if file.exists() else []
    lines += [line for line in before if line["config_sha256"] not in written]
    figures = [*RunResult.model_fields, *RunResult.model_computed_fields]
    columns = list(dict.fromkeys(["row", *tuned, *figures]))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomically(file, stream.getvalue())


def read_csv(file: Path) -> dict[str, RunResult]:
    """Reads the finished runs of a CSV file that a report has written, by `config_sha256`. Raises a
    ConfigError if the file cannot be read, or a line is no run."""
    results, number = {}, 1
    try:
        for line in _lines(file):
            number += 1
            result = RunResult.model_validate({key: of for key, of in line.items() if of})
            results[result.config_sha256] = result
    except (OSError, ValueError, csv.Error) as error:
        place = f"{file}, line {number}"
        raise ConfigError(f"{place}: expected the runs.csv of a report: {error}") from error
    return results


def _lines(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))
