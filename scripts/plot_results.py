"""Draws docs/ablations.png, docs/fresh_seeds.png and docs/geometry_loss.png from the CSV files of
docs/results.

python scripts/plot_results.py
"""

import csv
import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from results_data import Comparison, read_comparison
from results_page import GEOMETRY
from results_tables import read_geometry, seeds

from switchtitan.comparison.statistics import LEVEL

DOCS = Path(__file__).parents[1] / "docs"


def draw_ablations(of: Comparison) -> Figure:
    """Draws each row's difference in validation loss to the baseline, with its interval."""
    rows = [row for row in of.rows if row.startswith(of.baseline) and row != of.baseline]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        found = of.versus(row, of.baseline, "validation").difference
        half = None if found.high is None else found.high - found.mean
        axes.errorbar(found.mean, place, xerr=half, fmt="o", color="C0", capsize=3)
    axes.axvline(0.0, color="gray", linewidth=1)
    axes.set_yticks(range(len(rows)), [of.title(row) for row in rows])
    axes.invert_yaxis()
    interval = f"{100 * (1 - LEVEL):.0f} % interval of {len(of.seeds)} seeds"
    axes.set_xlabel(f"validation loss minus published keys', {interval}")
    axes.grid(axis="x", alpha=0.3)
    return figure


def draw_seeds(of: Comparison) -> Figure:
    """Draws the test loss of every run, with the mean of each row."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.margins(y=0.12)
    for place, row in enumerate(of.rows):
        values = list(of.losses(row).values())
        axes.plot(values, [place] * len(values), "o", color="C0", alpha=0.7)
        axes.plot(statistics.mean(values), place, "|", color="black", markersize=18)
    axes.set_yticks(range(len(of.rows)), [of.title(row) for row in of.rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"test loss on seeds {seeds(of)}; the bar is their mean")
    axes.grid(axis="x", alpha=0.3)
    return figure


def steps_of_last_change(file: Path) -> int:
    """Returns the steps between the last two checkpoints, from the CSV file of the geometry.

    Raises:
        ValueError: if it differs between the rows, or there is no row.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        steps = [[int(step) for step in row["steps"].split()] for row in csv.DictReader(stream)]
    changes = {last - before for *_, before, last in steps}
    if len(changes) != 1:
        raise ValueError(
            f"{file}: the rows' last changes are of {sorted(changes)} steps; expected one number; "
            "measure all rows at the same steps"
        )
    return changes.pop()


def draw_geometry(measured: Mapping[str, Mapping[str, float]], steps_of_change: int) -> Figure:
    """Draws every row's loss against the effective rank of its weights and of their last change.

    Args:
        steps_of_change: the length of that change.
    """
    change = f"their change in the last {steps_of_change} steps"
    figure = Figure(figsize=(11, 5), layout="constrained")
    weights, changes = figure.subplots(ncols=2, sharey=True)
    for axes, column, title in (
        (weights, "weight_effective_rank", "effective rank of the weights"),
        (changes, "update_effective_rank", f"effective rank of {change}"),
    ):
        for place, (row, numbers) in enumerate(measured.items()):
            marker = "osD^v"[place // 10]
            axes.plot(numbers[column], numbers["loss"], marker, color=f"C{place % 10}", label=row)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    weights.set_ylabel("validation loss")
    changes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main() -> None:
    """Writes the pictures."""
    results = DOCS / "results"
    keys = read_comparison(results, "switchlora_ablations", "rank_16")
    fresh = read_comparison(results, "rank_16_gentler")
    draw_ablations(keys).savefig(DOCS / "ablations.png", dpi=120)
    draw_seeds(fresh).savefig(DOCS / "fresh_seeds.png", dpi=120)
    geometry = results / GEOMETRY
    draw_geometry(read_geometry(geometry), steps_of_last_change(geometry)).savefig(
        DOCS / "geometry_loss.png", dpi=120
    )


if __name__ == "__main__":
    main()
