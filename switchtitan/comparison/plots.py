"""The picture of a comparison: losses over training."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from switchtitan.comparison.comparison import ComparisonState
from switchtitan.comparison.plan import Run
from switchtitan.comparison.runs import RunResult
from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.observability.curves import read_curves

_NUM_COLOURS = 10


def draw_curves(state: ComparisonState) -> Figure:
    """Plots validation loss over training: mean and standard deviation over reported seeds.

    Runs without a folder on this machine are left out.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    drawn = []
    for place, row in enumerate(state.config.rows):
        runs = {
            run: result
            for run, result in state.report.items()
            if run.row == row.name
            and not result.diverged
            and (run.folder / TENSORBOARD_FOLDER).exists()
        }
        if not runs:
            continue
        tokens, losses = _validation_curves(runs)
        mean = losses.mean(axis=0)
        style, colour = "-" if place < _NUM_COLOURS else "--", f"C{place % _NUM_COLOURS}"
        axes.plot(tokens, mean, style, color=colour, label=row.title)
        if len(runs) > 1:
            deviation = losses.std(axis=0, ddof=1)
            axes.fill_between(
                tokens, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0
            )
        drawn.append(mean)
    axes.set(title=state.config.name, xlabel="M tokens", ylabel="validation loss (nats per token)")
    if drawn:
        # Without the untrained models' loss, which would hide the differences.
        axes.set_ylim(min(map(np.min, drawn)) * 0.98, max(of[1:].max() for of in drawn) * 1.02)
        axes.legend(frameon=False, title="mean ± standard deviation")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _validation_curves(runs: Mapping[Run, RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Returns M tokens [points] and losses [runs, points] at the steps that all runs have."""
    curves = [read_curves(run.folder)["loss/validation"] for run in runs]
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    first = next(iter(runs.values()))
    tokens_per_step = (first.tokens or 0) / first.steps / 1e6
    losses = np.array([[table[step] for step in steps] for table in tables])
    return np.array(steps) * tokens_per_step, losses
