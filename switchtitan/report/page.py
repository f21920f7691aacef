"""A report of runs as one HTML page, which loads nothing: results, pictures, configurations."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from switchtitan.config import flatten, parse_toml
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.observability import RESULTS_FILE
from switchtitan.observability.tensorboard import Curve, read_curves
from switchtitan.registry import toml_value
from switchtitan.training.output import CONFIG_FILE

Table = Sequence[Sequence[str]]
"""Rows of cells; the first row is the head."""
Pictures = dict[str, tuple[Figure, Table | None]]
"""By heading, each perhaps with a table."""
_NOT_KNOWN = "-"
_STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border-bottom: 1px solid #ccc; padding: 0.2em 0.8em; text-align: right;
  overflow-wrap: anywhere; }
td:first-child, th:first-child { text-align: left; white-space: nowrap; }
svg { max-width: 100%; height: auto; }"""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder says of it."""

    curves: Mapping[str, Curve]
    """Steps and values by metric."""
    results: Mapping[str, Any]
    """`results.json`, with dotted keys; empty if the run is not finished."""
    config: Mapping[str, str]
    """Values as in TOML, by dotted key."""


def read_run(folder: Path) -> RunRecord:
    """Reads a run's output folder. Raises a ConfigError if it is not the folder of a run, or a file
    is damaged."""
    curves = read_curves(folder)
    results_file, config_file = folder / RESULTS_FILE, folder / CONFIG_FILE
    results: dict[str, Any] = {}
    try:
        if results_file.exists():
            results = flatten(json.loads(results_file.read_text(encoding="utf-8")))
        config = flatten(parse_toml(config_file.read_text(encoding="utf-8"), str(config_file)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read: {error}") from error
    return RunRecord(curves, results, {key: toml_value(value) for key, value in config.items()})


def write_page(runs: Mapping[str, RunRecord], pictures: Pictures, file: Path) -> None:
    """Writes the page of runs by label."""
    differing, same = _configurations(runs)
    parts = ["<h1>Runs</h1>", _html_table(_results(runs))]
    for heading, (figure, table) in pictures.items():
        svg = io.StringIO()
        figure.savefig(svg, format="svg")
        # Without the XML declaration, which HTML does not allow here.
        text = svg.getvalue()
        parts += [f"<h2>{escape(heading)}</h2>", text[text.index("<svg") :]]
        parts += [] if table is None else [_html_table(table)]
    if len(differing) > 1:
        parts += ["<h2>Keys that differ</h2>", _html_table(differing)]
    parts += [f"<details><summary>All other keys</summary>{_html_table(same)}</details>"]
    head = f'<meta charset="utf-8"><title>{escape(", ".join(runs))}</title><style>{_STYLE}</style>'
    write_atomically(file, "\n".join(["<!doctype html>", head, *parts, ""]))


def _results(runs: Mapping[str, RunRecord]) -> Table:
    """A row for each result that any run has: a row for each run would be wider than the page.

    Without keys of the configuration, which `results.json` repeats.
    """
    rows = [["", *runs]]
    for key in dict.fromkeys(key for record in runs.values() for key in record.results):
        values = [record.results.get(key) for record in runs.values()]
        is_key = any(key in record.config for record in runs.values())
        if not is_key and any(value is not None for value in values):
            rows.append([key, *map(_shown, values)])
    return rows


def _shown(value: object) -> str:
    if value is None:
        return _NOT_KNOWN
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _configurations(runs: Mapping[str, RunRecord]) -> tuple[Table, Table]:
    """Returns the keys that differ between runs, with all values, and all others with theirs."""
    keys = dict.fromkeys(key for record in runs.values() for key in record.config)
    differing, same = [["key", *runs]], [["key", "value"]]
    for key in keys:
        values = [record.config.get(key, _NOT_KNOWN) for record in runs.values()]
        if len(set(values)) > 1:
            differing.append([key, *values])
        else:
            same.append([key, values[0]])
    return differing, same


def _html_table(rows: Table) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        cells = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join(["<table>", *lines, "</table>"])
