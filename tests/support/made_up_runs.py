"""CSV files of declared comparisons with losses that were made up."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import results_data

from support.finished_runs import RESULTS
from switchtitan.comparison.config import load_comparison
from switchtitan.comparison.plan import Run, report_runs
from switchtitan.comparison.results import result_of
from switchtitan.comparison.runs_csv import run_record, runs_csv


def write_runs(folder: Path, name: str, loss: Callable[[Run], float]) -> list[str]:
    """Writes the CSV file of a declared comparison, with made-up losses; returns its lines."""
    declared = load_comparison(results_data.DECLARATIONS / f"{name}.toml")
    chosen = {row.name: {key: values[1] for key, values in row.values.items()}
              for row in declared.rows}  # fmt: skip
    records = []
    for run in report_runs(declared, chosen):
        losses = {"loss/test": loss(run), "loss/validation": loss(run) - 0.1}
        figures = RESULTS | losses | {"bits_per_byte/test": 1.5 + run.seed / 100}
        figures["effective_rank"] = 50.0 + run.seed
        digest = hashlib.sha256(run.name.encode()).hexdigest()
        result = result_of(run, figures, digest, has_folder=False)
        records.append(run_record("report", result, declared.axes))
    text = runs_csv(records, declared.axes)
    (folder / f"{name}.csv").write_text(text)
    return text.splitlines(keepends=True)


def made_up_loss(run: Run, distance: float) -> float:
    """Full rank differs by seed, and the distance of other rows by seed, row and comparison."""
    return 3 + run.seed / 100 + made_up_distance(run.seed, run.row, distance)


def made_up_distance(seed: int, row: str, distance: float) -> float:
    noise = ((7 + round(100 * distance)) * seed + 3 * len(row)) % 5 - 2
    return 0 if row == "full_rank" else distance + noise / 500
