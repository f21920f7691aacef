"""Draws runs next to each other: their curves, spectra of the change of their weights, and one HTML
page, which loads nothing, with results, pictures and configurations."""

import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, option_context

from switchtitan.config import flatten, parse_toml
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.observability import PLOT_STYLE, RESULTS_FILE
from switchtitan.observability.tensorboard import Curve
from switchtitan.registry import toml_value
from switchtitan.training.output import CONFIG_FILE
from switchtitan.workbench.spectra.weight_change import (
    checkpoint_spectra,
    mean_effective_rank,
    mean_normalized_spectrum,
)

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
Pictures = dict[str, tuple[Figure, DataFrame | None]]
"""By heading, each perhaps with a table."""
_NOT_KNOWN = "-"
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: right;
  overflow-wrap: anywhere; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
svg { max-width: 100%; height: auto; }"""


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


def draw_spectra(runs: Mapping[str, Path]) -> tuple[Figure, DataFrame]:
    """Draws mean spectra of runs by label; returns them with a table of mean effective ranks over
    layers, and the full ranks. See `checkpoint_spectra`."""
    lines, rows = [], {}
    for label, run in runs.items():
        step, spectra = checkpoint_spectra(run)
        mean = mean_normalized_spectrum(spectra).tolist()
        lines.append((label, "-", range(1, len(mean) + 1), mean))
        rows[label] = [step, f"{mean_effective_rank(spectra):.1f}", len(mean)]
    table = DataFrame.from_dict(rows, "index", columns=["step", "effective rank", "of"])
    return draw({_SINGULAR_VALUES: lines}), table


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


# The page.
def write_page(runs: Mapping[str, Path], pictures: Pictures, file: Path) -> None:
    """Writes the page of runs, output folders by label. Raises a ConfigError if a folder is not a
    run's, or a file in it is damaged."""
    found = {label: _read(folder) for label, folder in runs.items()}
    keys = DataFrame({label: config for label, (config, _) in found.items()}).fillna(_NOT_KNOWN)
    keys.columns.name = "key"
    differs = keys.nunique(axis="columns") > 1
    # A row for each result: a row for each run would be wider than the page.
    results = DataFrame({label: of for label, (_, of) in found.items()}, dtype=object)
    parts = ["<h1>Runs</h1>", _html(results.fillna(_NOT_KNOWN))]
    for heading, (figure, table) in pictures.items():
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        # Without the XML declaration, which HTML does not allow here.
        text = svg.getvalue()
        parts += [f"<h2>{escape(heading)}</h2>", text[text.index("<svg") :]]
        parts += [] if table is None else [_html(table)]
    if differs.any():
        parts += ["<h2>Keys that differ</h2>", _html(keys[differs])]
    same = keys[~differs].iloc[:, :1].set_axis(["value"], axis="columns")
    parts += [f"<details><summary>All other keys</summary>{_html(same)}</details>"]
    head = f'<meta charset="utf-8"><title>{escape(", ".join(runs))}</title><style>{_STYLE}</style>'
    write_atomically(file, "\n".join(["<!doctype html>", head, *parts, ""]))


def _read(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Returns a run's configuration, values as in TOML, and its results by dotted key, without
    those of the configuration; none if it is not finished."""
    results_file, config_file = folder / RESULTS_FILE, folder / CONFIG_FILE
    results: dict[str, Any] = {}
    try:
        if results_file.exists():
            results = flatten(json.loads(results_file.read_text(encoding="utf-8")))
        config = flatten(parse_toml(config_file.read_text(encoding="utf-8"), str(config_file)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read: {error}") from error
    known = (key for key, value in results.items() if value is not None and key not in config)
    keys = {key: toml_value(value) for key, value in config.items()}
    return keys, {key: _shown(results[key]) for key in known}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _html(table: DataFrame) -> str:
    with option_context("display.max_colwidth", None):
        return str(table.to_html(bold_rows=False, border=0))
