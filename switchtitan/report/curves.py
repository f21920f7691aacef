"""Draws the curves of runs: losses, learning rate and switches."""

import math
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchtitan.observability import PLOT_STYLE
from switchtitan.observability.tensorboard import Curve

Runs = Mapping[str, Mapping[str, Curve]]
"""Curves by label and metric."""
TRAIN_LOSS, VALIDATION_LOSS, LEARNING_RATE = "loss/train", "loss/validation", "optimizer/lr"
NUM_SWITCHED, COVERAGE = "switch/vectors_switched_total", "switch/candidate_coverage"


@rc_context(PLOT_STYLE)
def draw_curves(runs: Runs) -> Figure:
    """Draws losses on the left; learning rate and, if any run switched, switches on the right."""
    figure = Figure()
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
    num_columns = 4 if len(runs) == 1 else 2
    legend = figure.legend(loc="outside lower center", ncols=num_columns)
    figure.set_size_inches(10, 4.6 + 0.25 * math.ceil(len(legend.get_texts()) / num_columns))
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    return figure


def _draw_losses(axes: Axes, runs: Runs, colours: Mapping[str, str]) -> None:
    for label, curves in runs.items():
        colour, prefix = colours[label], f"{label}, " if len(runs) > 1 else ""
        if TRAIN_LOSS in curves:
            shown = f"{prefix}training"
            axes.plot(*curves[TRAIN_LOSS], color=colour, alpha=0.55, label=shown)
        if VALIDATION_LOSS in curves:
            shown = f"{prefix}validation"
            axes.plot(*curves[VALIDATION_LOSS], "o--", color=colour, label=shown)
    axes.set(title="Loss", xlabel="step", ylabel="cross entropy per token (nats)")


def _draw_switches(axes: Axes, runs: Runs, colours: Mapping[str, str]) -> None:
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
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
