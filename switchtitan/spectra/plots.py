"""Spectra of the change of runs' weights since step 0, next to each other."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from switchtitan.checkpoint.load import find_given
from switchtitan.errors import ConfigError
from switchtitan.observability import PLOT_STYLE
from switchtitan.observability.tensorboard import read_curves
from switchtitan.spectra.spectrum import RankSummary, mean_normalized_spectrum, summarize
from switchtitan.spectra.weight_change import checkpoint_spectra

_PANELS = {
    "spectrum": ("-", "Singular values of the change", "index", "mean over layers, largest = 1"),
    "by_kind": ("o", "Effective rank of the change", "", "mean over blocks"),
    "over_training": (".-", "Effective rank over training", "step", "mean over layers"),
}
"""Attribute of `RunSpectra` -> how its points are drawn, title and labels of the axes."""


@dataclass(frozen=True)
class RunSpectra:
    """Spectra of a checkpoint's change since step 0, averaged over layers."""

    step: int
    ranks: RankSummary
    spectrum: Mapping[int, float]
    """Index from 1 -> singular value, as a share of the largest one."""
    by_kind: Mapping[str, float]
    """Kind of layer -> effective rank, averaged over blocks."""
    over_training: Mapping[int, float]
    """Step up to the checkpoint's -> effective rank in TensorBoard's events; empty without it."""


def measure(run: Path) -> RunSpectra:
    """Computes spectra of the weights' change since step 0. Ranks compare runs of one model.

    Args:
        run: a run, of which it is the newest complete checkpoint, or a checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint, or the run's initial weights are no longer
            available.
    """
    checkpoint = find_given(run)
    step, spectra = checkpoint_spectra(checkpoint)
    ranks = summarize(spectra)
    over_training = dict[int, float]()
    with suppress(ConfigError, KeyError):  # a run without TensorBoard, or without telemetry
        curve = read_curves(checkpoint.resolve().parents[1])["rank/effective_mean"]
        over_training = {at: rank for at, rank in zip(*curve, strict=True) if at <= step}
    return RunSpectra(
        step,
        ranks,
        spectrum=dict(enumerate(mean_normalized_spectrum(spectra).tolist(), start=1)),
        by_kind={kind.removesuffix("_proj"): of for kind, of in ranks.effective_by_kind.items()},
        over_training=over_training,
    )


def table(runs: Mapping[str, RunSpectra]) -> DataFrame:
    """Returns each run's mean rank over layers, and the full rank."""
    rows = {
        label: [run.step, f"{run.ranks.effective:.1f}", len(run.spectrum)]
        for label, run in runs.items()
    }
    return DataFrame.from_dict(rows, "index", columns=["step", "effective rank", "of"])


@rc_context(PLOT_STYLE)
def draw(runs: Mapping[str, RunSpectra]) -> Figure:
    """Draws mean spectrum, effective rank by kind of layer and, if measured, over training."""
    panels = [name for name in _PANELS if any(getattr(run, name) for run in runs.values())]
    figure = Figure(figsize=(4.8 * len(panels), 4.4))
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style, title, xlabel, ylabel = _PANELS[name]
        for label, run in runs.items():
            points: Mapping[Any, float] = getattr(run, name)
            axes.plot(list(points), list(points.values()), style, label=label)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        if name == "spectrum":
            axes.set(yscale="log", ylim=(1e-5, 1.5))  # below is fp32 noise
    axes.legend()
    return figure
