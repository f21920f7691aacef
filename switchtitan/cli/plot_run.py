"""Draws the curves of one or more runs: losses, learning rate and switches.

switchtitan plot run outputs/RUN [outputs/RUN ...] --output curves.png
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchtitan.errors import UserError, exit_for
from switchtitan.observability.curves import Curve, read_curves
from switchtitan.observability.pictures import write_picture

TRAIN_LOSS, VALIDATION_LOSS = "loss/train", "loss/validation"
LEARNING_RATE = "optimizer/lr"
NUM_SWITCHED, COVERAGE = "switch/vectors_switched_total", "switch/candidate_coverage"


def main(argv: Sequence[str]) -> None:
    """Draws the given runs."""
    options = read_options(argv)
    try:
        runs = {label: read_curves(run) for label, run in labelled(options.runs).items()}
        write_picture(draw(runs), options.output)
    except UserError as error:
        exit_for(error)
    print(options.output)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; argparse exits with status 2 on an error."""
    parser = argparse.ArgumentParser(
        prog="switchtitan plot run",
        description="Draws the curves of one or more runs.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output folder")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the picture; the extension selects the format (png, svg, pdf)",
    )
    return parser.parse_args(argv)


def labelled(runs: Sequence[Path]) -> dict[str, Path]:
    """Returns runs by label: the folder's name if it is unique, otherwise the path as given."""
    names = [run.resolve().name for run in runs]
    return {
        name if names.count(name) == 1 else str(run): run
        for name, run in zip(names, runs, strict=True)
    }


def draw(runs: dict[str, dict[str, Curve]]) -> Figure:
    """Draws losses on the left; learning rate and, if any run switched, switches on the right."""
    figure = Figure(layout="constrained")
    switching = {label: curves for label, curves in runs.items() if NUM_SWITCHED in curves}
    if switching:
        panels = figure.subplot_mosaic([["loss", "lr"], ["loss", "switch"]], width_ratios=[1.3, 1])
    else:
        panels = figure.subplot_mosaic([["loss", "lr"]], width_ratios=[1.3, 1])
    colours = {label: f"C{index}" for index, label in enumerate(runs)}
    _draw_losses(panels["loss"], runs, colours)
    for label, curves in runs.items():
        if LEARNING_RATE in curves:
            panels["lr"].plot(*curves[LEARNING_RATE], color=colours[label])
    panels["lr"].set(title="Learning rate", xlabel="step", ylim=(0, None))
    if switching:
        _draw_switches(panels["switch"], switching, colours)
    legend_rows = _draw_legend(figure, panels.values(), num_columns=4 if len(runs) == 1 else 2)
    figure.set_size_inches(10, 4.6 + 0.25 * legend_rows)
    for panel in panels.values():
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    return figure


def _draw_legend(figure: Figure, panels: Iterable[Axes], num_columns: int) -> int:
    """Draws one legend below all panels, filled row by row; returns the number of rows."""
    keys = [key for panel in panels for key in zip(*panel.get_legend_handles_labels(), strict=True)]
    # matplotlib fills a legend column by column.
    keys = [key for column in range(num_columns) for key in keys[column::num_columns]]
    lines, labels = [line for line, _ in keys], [label for _, label in keys]
    figure.legend(lines, labels, loc="outside lower center", ncols=num_columns, frameon=False)
    return math.ceil(len(keys) / num_columns)


def _draw_losses(axes: Axes, runs: dict[str, dict[str, Curve]], colours: dict[str, str]) -> None:
    prefix = "{}, " if len(runs) > 1 else ""
    for label, curves in runs.items():
        if TRAIN_LOSS in curves:
            axes.plot(
                *curves[TRAIN_LOSS],
                color=colours[label],
                alpha=0.55,
                label=prefix.format(label) + "training",
            )
        if VALIDATION_LOSS in curves:
            axes.plot(
                *curves[VALIDATION_LOSS],
                "o--",
                color=colours[label],
                label=prefix.format(label) + "validation",
            )
    axes.set(title="Loss", xlabel="step", ylabel="cross entropy per token (nats)")


def _draw_switches(axes: Axes, runs: dict[str, dict[str, Curve]], colours: dict[str, str]) -> None:
    """Draws vectors switched so far (left axis) and percent of candidates ever used (right)."""
    right = axes.twinx()
    for label, curves in runs.items():
        axes.plot(*curves[NUM_SWITCHED], color=colours[label])
        steps, shares = curves[COVERAGE]
        right.plot(steps, [100 * share for share in shares], ":", color=colours[label])
    axes.plot([], [], color="grey", label="vectors switched so far (left)")
    axes.plot([], [], ":", color="grey", label="candidates used so far (right)")
    axes.set(title="Switches", xlabel="step", ylabel="vectors", ylim=(0, None))
    right.set(ylabel="% of candidates", ylim=(0, 100))
    right.spines["top"].set_visible(False)
