"""Reads the report of a comparison and the curves of its runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from switchtitan.errors import ConfigError
from switchtitan.files import exists
from switchtitan.observability import RESULTS_FILE
from switchtitan.report.run_files import Count, RunRecord, read_run

_REPORTS_FOLDER, _RUNS_FOLDER = "reports", "runs"
_MAX_FILE_BYTES = 1 << 26


class _Parsed(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Sample(_Parsed):
    """Mean and standard deviation over seeds; a mean of None is not finite."""

    mean: float | None
    std: float | None
    num: Count


class Difference(Sample):
    """A difference of two rows, with the 95 % interval of its mean."""

    low: float | None
    high: float | None


class Share(_Parsed):
    """A share of a gap, with its 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    num: Count


class StepTime(_Parsed):
    """Step time divided by the baseline's, with its interval, and bytes that a rank sends."""

    step_ratio: float
    step_ratio_low: float
    step_ratio_high: float
    bytes_per_step: float


class Tried(_Parsed):
    """What a row has tried of a key: validation losses by value, None if the run diverged."""

    key: str
    place: Count
    is_interior: bool | None
    losses: dict[float, float | None]


class Row(_Parsed):
    """A row of the comparison's table."""

    name: str
    title: str
    values: dict[str, float]
    tried: list[Tried]
    num_diverged: Count
    loss: Sample | None
    perplexity: Sample | None
    validation_loss: Sample | None
    validation_bits_per_byte: Sample | None
    test_bits_per_byte: Sample | None
    difference: Difference | None
    adjusted_p: float | None
    verdict: str | None
    effective_rank: Sample | None
    num_tokens: Count | None = None
    """Training tokens of a run; earlier versions did not write them."""
    num_trainable: Count | None
    state_gib: float | None
    peak_gib: float | None
    tokens_per_s: float | None
    measured: StepTime | None


class Gap(_Parsed):
    """The share of the difference between two rows that a third one closes."""

    row: str
    start: str
    end: str
    gap: Difference | None
    share: Share | None


class FinishedRun(_Parsed):
    """A finished run of a comparison."""

    stage: str
    row: str
    seed: int
    diverged: bool
    test_loss: float | None
    folder: str | None
    """None if the run is known from a CSV file only."""


class ComparisonResults(_Parsed):
    """What a report shows of a comparison's `results.json`."""

    comparison: str
    """Its declaration as TOML."""
    num_runs_finished: Count
    num_runs: Count
    rows: list[Row]
    gaps: list[Gap]
    runs: list[FinishedRun]


@dataclass(frozen=True)
class ComparisonRecord:
    """A comparison's results and its reported runs that did not diverge."""

    folder: Path
    results: ComparisonResults
    runs: Mapping[str, Mapping[int, RunRecord]] = field(default_factory=dict)
    """By row and seed."""
    notes: tuple[str, ...] = ()
    """What is missing or damaged."""


def find_comparison(folder: Path) -> Path | None:
    """Returns the folder of a comparison's report, None if `folder` is not one's.

    Args:
        folder: that folder, or the comparison's `output_dir` if only one comparison has it.

    Raises:
        ConfigError: if several comparisons share the `output_dir`.
    """
    if (folder / RESULTS_FILE).is_file() and folder.parent.name == _REPORTS_FOLDER:
        return folder
    found = sorted(folder.glob(f"{_REPORTS_FOLDER}/*/{RESULTS_FILE}")) if folder.is_dir() else []
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: {len(found)} comparisons have reports there; give one of "
            f"{', '.join(str(file.parent) for file in found)}"
        )
    return found[0].parent if found else None


def read_comparison(folder: Path) -> ComparisonRecord:
    """Reads the folder of a comparison's report.

    Raises:
        ConfigError: if its results are missing or damaged.
    """
    file = folder / RESULTS_FILE
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
        results = ComparisonResults.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
        reason = f"{first['msg']} at {'.'.join(map(str, first['loc']))}" if first else str(error)
        raise ConfigError(
            f"{file}: holds no results of a comparison ({reason}); write them again with "
            "`switchtitan compare FILE --report-only`"
        ) from error
    notes: list[str] = []
    if results.num_runs_finished < results.num_runs:
        notes.append(
            f"{results.num_runs_finished} of {results.num_runs} runs are finished; "
            "`switchtitan compare` trains the others"
        )
    return ComparisonRecord(folder, results, _read_runs(folder, results, notes), tuple(notes))


def _read_runs(
    folder: Path, results: ComparisonResults, notes: list[str]
) -> dict[str, dict[int, RunRecord]]:
    runs: dict[str, dict[int, RunRecord]] = {}
    for of in results.runs:
        if of.stage != "report" or of.diverged:
            continue
        if of.folder is None:
            notes.append(f"{of.row}, seed {of.seed}: from finished_runs; its curves are missing")
            continue
        try:
            record = read_run(_run_folder(folder, of.folder))
        except ConfigError as error:
            notes.append(f"{of.row}, seed {of.seed}: {error}")
            continue
        notes += [f"{of.row}, seed {of.seed}: {note}" for note in record.notes]
        runs.setdefault(of.row, {})[of.seed] = record
    return runs


def _run_folder(folder: Path, of_run: str) -> Path:
    """Returns a run's folder, also if the comparison was moved or called from another folder."""
    given = Path(of_run)
    own = folder.resolve().parents[1] / _RUNS_FOLDER / given.parent.name / given.name
    return own if exists(own) else given
