"""A report of runs as one HTML page, which loads nothing: results, pictures, configurations."""

import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pandas import DataFrame, option_context

from switchtitan.config import flatten, parse_toml
from switchtitan.errors import ConfigError
from switchtitan.files import write_atomically
from switchtitan.observability import RESULTS_FILE
from switchtitan.registry import toml_value
from switchtitan.training.output import CONFIG_FILE

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
