"""Draws runs next to each other: their curves, and spectra of the change of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from switchtitan.checkpoint.load import find_given
from switchtitan.observability import PLOT_STYLE
from switchtitan.observability.tensorboard import Curve
from switchtitan.spectra.spectrum import RankSummary, mean_normalized_spectrum, summarize
from switchtitan.spectra.weight_change import checkpoint_spectra

Panels = dict[str, list[tuple[str, str, Any, Any]]]
"""Title -> lines: label, how their points are drawn, x and y."""
_CURVES = {
    "Loss by step (nats per token)": {"loss/train": "-", "loss/validation": "o--"},
    "Learning rate by step": {"optimizer/lr": "-"},
    "Vectors switched by step": {"switch/vectors_switched_total": "-"},
    "Share of candidates used by step": {"switch/candidate_coverage": "-"},
    "Effective rank of the change by step": {"rank/effective_mean": ".-"},
}
"""Title -> metrics, and how their points are drawn."""
_SINGULAR_VALUES = "Singular values of the change by index, largest = 1"


class RunSpectra(NamedTuple):
    """Spectra of a checkpoint's change since step 0."""

    step: int
    ranks: RankSummary
    spectrum: list[float]
    """Mean over layers of singular values as shares of the layer's largest."""


def measure(run: Path) -> RunSpectra:
    """Computes spectra of the weights' change since step 0. Ranks compare runs of one model.

    Args:
        run: a run, of which it is the newest complete checkpoint, or a checkpoint.

    Raises:
        CheckpointError: if there is no checkpoint, or the run's initial weights are no longer
            available.
    """
    step, spectra = checkpoint_spectra(find_given(run))
    return RunSpectra(step, summarize(spectra), mean_normalized_spectrum(spectra).tolist())


def rank_table(runs: Mapping[str, RunSpectra]) -> DataFrame:
    """Returns each run's mean rank over layers, and the full rank."""
    rows = {
        label: [run.step, f"{run.ranks.effective:.1f}", len(run.spectrum)]
        for label, run in runs.items()
    }
    return DataFrame.from_dict(rows, "index", columns=["step", "effective rank", "of"])


def curve_panels(runs: Mapping[str, Mapping[str, Curve]]) -> Panels:
    """Returns what runs' curves by metric tell: losses, learning rate, switches, measured ranks."""
    return {
        title: [
            (f"{label}, {metric}", style, *curves[metric])
            for label, curves in runs.items()
            for metric, style in metrics.items()
            if metric in curves
        ]
        for title, metrics in _CURVES.items()
    }


def spectrum_panels(runs: Mapping[str, RunSpectra]) -> Panels:
    """Returns mean spectra, and effective ranks by kind of layer."""
    by_index, by_kind = [], []
    for label, run in runs.items():
        by_index.append((label, "-", range(1, len(run.spectrum) + 1), run.spectrum))
        ranks = run.ranks.effective_by_kind
        by_kind.append((label, "o", list(ranks), list(ranks.values())))
    return {_SINGULAR_VALUES: by_index, "Effective rank of the change by layer": by_kind}


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
