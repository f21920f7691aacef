"""Measures the geometry of every method for docs/RESULTS.md: docs/results/geometry_python.csv.

    python scripts/measure_geometry.py [--jobs N] [--again]

Trains each row of `SOURCES` once more, with the values that its comparison selected, on one seed,
and keeps several checkpoints. Then `switchtitan geometry` measures all of them against full rank.
The same command continues a run that was stopped. A row of the CSV file is kept if its run has the
same configuration, and full rank gives the same numbers. `--again` measures all rows. All numbers
of a run are in `geometry.json` in its folder."""

import argparse
import csv
import io
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from results_data import read_comparison
from results_page import FOLDER, GEOMETRY

from switchtitan.cli.record import write_json
from switchtitan.comparison.config import ComparisonConfig, RowConfig
from switchtitan.comparison.plan import Run, plan_run
from switchtitan.comparison.results import config_sha256, read_result
from switchtitan.comparison.runner import Runner
from switchtitan.files import write_atomically
from switchtitan.geometry.activations import mean_similarity
from switchtitan.geometry.measure import Geometry, Options, measure, prepare
from switchtitan.geometry.report import as_json
from switchtitan.geometry.runs import open_run

OUTPUT = Path("outputs/geometry_python")
CSV_FILE = FOLDER / GEOMETRY
SEED = 2
NUM_TOKENS = 16_384
"""Of the validation split, on which losses and activations are computed."""
CHECKPOINTS = ("--checkpoint.interval", "200", "--checkpoint.keep_latest", "5")
RELORA = {
    "name": "relora-r16",
    "label": "ReLoRA",
    "set": {
        "method": {
            "name": "relora",
            "rank": 16,
            "reset_interval": 200,
            "restart_warmup_steps": 20,
        }
    },
}
"""The row that no comparison of this size has. It trains with LoRA's values."""
SOURCES = {
    "own_rate_python": (
        *("full_rank", "lora-r16", "lora-balanced-r16", "switchlora-r16"),
        *("galore-r16", "apollo-r16"),
    ),
    "preset_python": ("switchlora-gentle-r16", "switchlora-gentle-muon-r16"),
    "optimizers_python": ("muon", "scale", "fira-r16", "low-rank-r16"),
    "sltrain_python": ("sltrain-r16",),
}
"""Comparison -> the rows that are measured with the values that it selected."""

Row = Mapping[str, object]
"""A line of the CSV file: column -> value."""
_ROUNDING = 1e-4
"""Relative difference up to which two measurements of one run are the same."""


def main(argv: Sequence[str]) -> None:
    """Trains and measures what is missing, and writes the CSV file."""
    parser = argparse.ArgumentParser(prog="scripts/measure_geometry.py", allow_abbrev=False)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, and then threads; default: 1"
    )
    parser.add_argument(
        "--again", action="store_true", help="measure all rows, also those of the CSV file"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    all_runs = planned(FOLDER)
    known = {} if options.again else known_rows(CSV_FILE, all_runs)
    full_rank, *_ = all_runs
    missing = [title for title in all_runs if title not in known]
    if not missing:
        logging.info("%s has every row; use --again to measure all of them", CSV_FILE)
        return
    measured = _measure(
        {title: all_runs[title] for title in dict.fromkeys([full_rank, *missing])}, options.jobs
    )
    check_full_rank(known.get(full_rank), measured[full_rank])
    rows = measured | known
    write_atomically(CSV_FILE, table([rows[title] for title in all_runs]))


def _measure(runs: Mapping[str, Run], jobs: int) -> dict[str, Row]:
    """Trains the runs that are not finished, and returns the columns of all; full rank is first.

    Writes all numbers of a run to its folder, too.
    """
    Runner(jobs).run_all(
        list(runs.values()),
        lambda run: read_result(run) is not None,
        lambda run: logging.info("%s finished", run.name),
    )
    trained = {title: open_run(title, run.folder) for title, run in runs.items()}
    full_rank, *_ = trained.values()
    options = Options(parts=None, num_tokens=NUM_TOKENS)
    torch.set_num_threads(jobs)
    prepared = {
        title: prepare(run, None if run is full_rank else full_rank, options)
        for title, run in trained.items()
    }
    rows: dict[str, Row] = {}
    for title, run in runs.items():
        geometry = measure(prepared[title])
        write_json(run.folder / "geometry.json", as_json([geometry], options))
        rows[title] = identity(title, run) | numbers(geometry)
    return rows


def identity(title: str, run: Run) -> dict[str, object]:
    """Returns the columns of the CSV file that say which run a row is of."""
    return {"title": title, "run": run.name, "config_sha256": config_sha256(run.config())}


def known_rows(file: Path, runs: Mapping[str, Run]) -> dict[str, Row]:
    """Returns the rows of a CSV file that are of `runs`, by title and as text."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        rows: dict[str, Row] = {row["title"]: dict(row) for row in csv.DictReader(stream)}
    return {
        title: rows[title]
        for title, run in runs.items()
        if title in rows and identity(title, run).items() <= rows[title].items()
    }


def check_full_rank(known: Row | None, now: Row) -> None:
    """Checks that new rows can be compared with those of the CSV file, by full rank's numbers.

    Raises:
        ValueError: if a column of full rank's row differs by more than rounding.
    """
    if known is None:
        return
    for column, value in now.items():
        before = known.get(column)
        if isinstance(value, float) and (
            not before or not math.isclose(float(str(before)), value, rel_tol=_ROUNDING)
        ):
            raise ValueError(
                f"{CSV_FILE.name}: full rank's {column} was {before} and is {value} now, so new "
                "rows cannot be compared with those of the file; measure all of them with --again"
            )


def planned(folder: Path) -> dict[str, Run]:
    """Returns the runs by title, full rank first, with the values in the CSV files of `folder`."""
    runs = {}
    for name, rows in SOURCES.items():
        found = read_comparison(folder, name)
        placed = found.declared.model_copy(update={"output_dir": OUTPUT})
        for row in map(placed.row, rows):
            chosen = found.chosen(row.name)
            values = {key: chosen[key] for key in chosen if key not in row.given_values}
            runs[row.title] = _plan(placed, row, values)
            if row.name == "lora-r16":
                relora = row.model_copy(update=RELORA)
                runs[relora.title] = _plan(placed, relora, values)
    return runs


def _plan(placed: ComparisonConfig, row: RowConfig, values: Mapping[str, float]) -> Run:
    run = plan_run(placed, row, values, SEED)
    return replace(run, arguments=(*run.arguments, *CHECKPOINTS))


def table(rows: Sequence[Row]) -> str:
    """Returns rows as CSV, with all columns that one of them has."""
    columns = dict.fromkeys(column for row in rows for column in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def numbers(geometry: Geometry) -> dict[str, object]:
    """Returns the measured columns of the CSV file: means over layers, directions and blocks.

    Those of weights, sharpness and activations are of the newest checkpoint, those of updates of
    the change between the last two checkpoints.
    """
    spectral, sharpness, barriers = geometry.spectral, geometry.sharpness, geometry.barriers
    if spectral is None or sharpness is None or barriers is None:
        raise ValueError(f"{geometry.run.label}: not everything was measured: {geometry.left_out}")
    weight, update = spectral.weights[-1].mean, spectral.updates[-1].mean
    columns: dict[str, object] = {
        "steps": " ".join(map(str, geometry.run.steps)),
        "tokens": geometry.num_tokens,
        "loss": sharpness.loss,
    }
    for kind, found in (("weight", weight), ("update", update)):
        columns |= {f"{kind}_{key}": value for key, value in found._asdict().items()}
    del columns["weight_relative_norm"]  # of a weight to itself
    columns |= {
        "random_sharpness": sharpness.mean_random,
        "principal_sharpness": sharpness.principal[0],
        "largest_barrier": max(barrier.height for barrier in barriers.values()),
    }
    if geometry.barriers_to_other and geometry.activations:
        *_, barrier = geometry.barriers_to_other.values()
        *_, blocks = geometry.activations.values()
        columns["barrier_to_full_rank"] = barrier.height
        similarity = mean_similarity(list(blocks.values()))._asdict()
        columns |= {f"activation_{key}": value for key, value in similarity.items()}
    return columns


if __name__ == "__main__":
    main(sys.argv[1:])
