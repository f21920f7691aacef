"""Plots of a comparison: losses over training, against step time and against memory."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchtitan.comparison.comparison import ComparisonState
from switchtitan.comparison.results import RunResult
from switchtitan.comparison.table import RowReport
from switchtitan.observability.curves import read_curves
from switchtitan.observability.pictures import write_picture

_NUM_COLOURS = 10


def write_pictures(folder: Path, state: ComparisonState, rows: Sequence[RowReport]) -> list[Path]:
    """Writes the plots for which there are results; returns their paths.

    The files are `loss.png`, `loss_against_time.png` and `loss_against_memory.png`.
    """
    pictures = {"loss.png": draw_curves(state)}
    timed = [row for row in rows if row.loss is not None and row.measured is not None]
    if timed:
        pictures["loss_against_time.png"] = draw_against(
            timed,
            partial(_time, baseline=next(row for row in rows if row.name == state.config.baseline)),
            f"step time x steps / {state.config.baseline}'s",
        )
    finished = [row for row in rows if row.loss is not None and row.state_gib is not None]
    if finished:
        pictures["loss_against_memory.png"] = draw_against(
            finished,
            lambda row: row.state_gib * 1024,  # type: ignore[operator]
            "weights, optimizer state and candidates (MiB)",
        )
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / name)
        write_picture(figure, paths[-1])
    return paths


def _time(row: RowReport, baseline: RowReport) -> float:
    """Returns the time of a row's steps divided by that of the baseline's."""
    assert row.measured is not None
    longer = row.num_steps / baseline.num_steps if row.num_steps and baseline.num_steps else 1.0
    return row.measured.step_ratio * longer


def draw_curves(state: ComparisonState) -> Figure:
    """Plots validation loss over training: mean and standard deviation over reported seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    last = []
    for place, row in enumerate(state.config.rows):
        runs = [
            result
            for result in state.report
            if result.run.row == row.name and result.has_folder and not result.has_diverged
        ]
        if not runs:
            continue
        tokens, losses = _validation_curves(runs)
        mean = losses.mean(axis=0)
        style = "-" if place < _NUM_COLOURS else "--"
        axes.plot(tokens, mean, style, color=f"C{place % _NUM_COLOURS}", label=row.title)
        if len(runs) > 1:
            deviation = losses.std(axis=0, ddof=1)
            axes.fill_between(
                tokens,
                mean - deviation,
                mean + deviation,
                color=f"C{place % _NUM_COLOURS}",
                alpha=0.2,
                lw=0,
            )
        last.append(mean)
    axes.set(title=state.config.name, xlabel="M tokens", ylabel="validation loss (nats per token)")
    if last:
        # Without the untrained models' loss, which would hide the differences.
        axes.set_ylim(min(map(np.min, last)) * 0.98, max(curve[1:].max() for curve in last) * 1.02)
        axes.legend(frameon=False, title="mean ± standard deviation")
    _finish(axes)
    return figure


def draw_against(
    rows: Sequence[RowReport], place: Callable[[RowReport], float], title: str
) -> Figure:
    """Plots each row's test loss, with its standard deviation, against a cost."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(rows):
        assert row.loss is not None
        axes.errorbar(
            place(row),
            row.loss.mean,
            yerr=row.loss.std,
            fmt="o",
            capsize=3,
            color=f"C{index % _NUM_COLOURS}",
        )
        axes.annotate(
            row.title, (place(row), row.loss.mean), xytext=(6, 4), textcoords="offset points"
        )
    axes.set(xlabel=title, ylabel="test loss (nats per token)")
    axes.margins(x=0.25, y=0.15)
    _finish(axes)
    return figure


def _validation_curves(runs: Sequence[RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Returns M tokens [points] and losses [runs, points] at the steps that all runs have."""
    curves = [read_curves(result.run.folder)["loss/validation"] for result in runs]
    steps = sorted(set.intersection(*(set(steps) for steps, _ in curves)))
    tables = [dict(zip(*curve, strict=True)) for curve in curves]
    figures = runs[0].figures
    tokens_per_step = figures["tokens_seen"] / figures["step"] / 1e6
    return np.array(steps) * tokens_per_step, np.array(
        [[table[step] for step in steps] for table in tables]
    )


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
