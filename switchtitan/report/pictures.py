"""Draws runs next to each other: their curves, and spectra of the change of their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from switchtitan.checkpoint.load import find_given
from switchtitan.observability import PLOT_STYLE
from switchtitan.observability.tensorboard import Curve
from switchtitan.spectra.spectrum import RankSummary, mean_normalized_spectrum, summarize
from switchtitan.spectra.weight_change import checkpoint_spectra

Panels = dict[str, list[tuple[str, str, Any, Any]]]
"""Title -> lines: label, how their points are drawn, x and y."""
_LOSS = "Loss by step, in nats per token (dashed: validation)"
_SINGULAR_VALUES = "Singular values of the change by index"
_CURVES = {
    _LOSS: {"loss/train": "-", "loss/validation": "o--"},
    "Learning rate by step": {"optimizer/lr": "-"},
    "Vectors switched by step": {"switch/vectors_switched_total": "-"},
    "Share of candidates used by step": {"switch/candidate_coverage": "-"},
    "Effective rank of the change by step": {"rank/effective_mean": ".-"},
}
"""Title -> metrics, and how their points are drawn."""


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
            (label, style, *curves[metric])
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
    return {_SINGULAR_VALUES: by_index, "Effective rank of the change by kind of layer": by_kind}


@rc_context(PLOT_STYLE)
def draw(panels: Panels) -> Figure:
    """Draws the panels that have lines, two in a row, and a run in the same colour in all."""
    panels = {title: lines for title, lines in panels.items() if lines}
    num_rows = -(-len(panels) // 2)
    figure, drawn = Figure(figsize=(10, 3.5 * num_rows + 0.5)), dict[str, Line2D]()
    for number, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, 2, number, title=title)
        for label, style, x, y in lines:
            colour = drawn[label].get_color() if label in drawn else f"C{len(drawn)}"
            (line,) = axes.plot(x, y, style, color=colour)
            drawn.setdefault(label, line)
        if title == _SINGULAR_VALUES:
            axes.set(yscale="log", ylim=(1e-5, 1.5))  # below is fp32 noise
        elif title != _LOSS:
            axes.set_ylim(bottom=0)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=2)
    return figure
