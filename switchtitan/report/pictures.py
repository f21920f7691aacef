"""Draws runs next to each other: their curves, and spectra of the change of their weights."""

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame

from switchtitan.observability import PLOT_STYLE
from switchtitan.observability.tensorboard import Curve
from switchtitan.spectra.weight_change import Spectra, mean_effective_rank, mean_normalized_spectrum

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


def rank_table(runs: Mapping[str, tuple[int, Spectra]]) -> DataFrame:
    """Returns, for runs by label, step, mean effective rank over layers, and the full rank."""
    rows = {
        label: [step, f"{mean_effective_rank(spectra):.1f}", max(map(len, spectra.values()))]
        for label, (step, spectra) in runs.items()
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


def spectrum_panels(runs: Mapping[str, tuple[int, Spectra]]) -> Panels:
    """Returns mean spectra of runs by label."""
    means = {label: mean_normalized_spectrum(of).tolist() for label, (_, of) in runs.items()}
    lines = [(label, "-", range(1, len(mean) + 1), mean) for label, mean in means.items()]
    return {_SINGULAR_VALUES: lines}


@rc_context(PLOT_STYLE)
def draw(panels: Panels) -> Figure:
    """Draws the panels that have lines, up to two in a row, and each run in one colour."""
    panels = {title: lines for title, lines in panels.items() if lines}
    num_columns = min(len(panels), 2) or 1
    num_rows = -(-len(panels) // num_columns)
    figure, drawn = Figure(figsize=(10, 3.5 * num_rows + 0.5)), dict[str, Line2D]()
    for number, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, number, title=title)
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
