"""Draws runs next to each other: their curves, and spectra of the change of their weights."""

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
from switchtitan.observability.tensorboard import Curve, read_curves
from switchtitan.spectra.spectrum import RankSummary, mean_normalized_spectrum, summarize
from switchtitan.spectra.weight_change import checkpoint_spectra

Panels = dict[str, list[tuple[str, str, Any, Any]]]
"""Title -> lines: label, how their points are drawn, x and y."""
_CURVES = {
    "Loss by step (nats per token)": {"loss/train": "-", "loss/validation": "o--"},
    "Learning rate by step": {"optimizer/lr": "-"},
    "Vectors switched by step": {"switch/vectors_switched_total": "-"},
    "Share of candidates used by step": {"switch/candidate_coverage": "-"},
}
"""Title -> metrics, and how their points are drawn."""
_SINGULAR_VALUES = "Singular values of the change by index, largest = 1"
_SPECTRA = {
    "spectrum": (_SINGULAR_VALUES, "-"),
    "by_kind": ("Effective rank of the change by layer", "o"),
    "over_training": ("Effective rank of the change by step", ".-"),
}
"""Attribute of `RunSpectra` -> title, and how its points are drawn."""


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


def rank_table(runs: Mapping[str, RunSpectra]) -> DataFrame:
    """Returns each run's mean rank over layers, and the full rank."""
    rows = {
        label: [run.step, f"{run.ranks.effective:.1f}", len(run.spectrum)]
        for label, run in runs.items()
    }
    return DataFrame.from_dict(rows, "index", columns=["step", "effective rank", "of"])


def curve_panels(runs: Mapping[str, Mapping[str, Curve]]) -> Panels:
    """Returns losses, learning rate and switches of runs from their curves by metric."""
    return {
        title: [
            (f"{label}, {metric}", style, *found[metric])
            for label, found in runs.items()
            for metric, style in metrics.items()
            if metric in found
        ]
        for title, metrics in _CURVES.items()
    }


def spectrum_panels(runs: Mapping[str, RunSpectra]) -> Panels:
    """Returns mean spectrum, effective rank by kind of layer and, if measured, over training."""
    return {
        title: [
            (label, style, list(points), list(points.values()))
            for label, run in runs.items()
            if (points := getattr(run, name))
        ]
        for name, (title, style) in _SPECTRA.items()
    }


@rc_context(PLOT_STYLE)
def draw(panels: Panels) -> Figure:
    """Draws the panels that have lines side by side."""
    panels = {title: lines for title, lines in panels.items() if lines}
    figure = Figure(figsize=(4.8 * len(panels), 4.4))
    for title, axes in figure.subplot_mosaic([[*panels]]).items():
        for label, style, x, y in panels[title]:
            axes.plot(x, y, style, label=label)
        axes.set_title(title)
        axes.legend()
        if title == _SINGULAR_VALUES:
            axes.set(yscale="log", ylim=(1e-5, 1.5))  # below is fp32 noise
    return figure
