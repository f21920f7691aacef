"""The choice of the rows' values in the report of a comparison."""

import math
from collections.abc import Mapping, Sequence

from switchtitan.comparison.plan import short_name
from switchtitan.comparison.selection import is_rate
from switchtitan.report.charts import Metric, chart
from switchtitan.report.comparison_files import Row, Tried
from switchtitan.report.points import plain
from switchtitan.report.run_report import Contents
from switchtitan.report.tables import Cell, cell


def chosen_cell(row: Row, key: str) -> Cell:
    """Returns the chosen value of a key, and whether it is at the edge of its grid."""
    if key not in row.values:
        return cell(None)
    last = [tried for tried in row.tried if tried.key == key][-1:]
    at_edge = any(tried.is_interior is False for tried in last)
    hint = "the lowest or the highest one tried" if at_edge else ""
    value = row.values[key]
    return cell(f"{value:g}" + (" (edge)" if at_edge else ""), value, hint)


def selection_section(rows: Sequence[Row]) -> Contents | None:
    """Returns a chart for each key in turn; None without finished runs."""
    by_axis: dict[int, dict[int, Tried]] = {}
    for series, row in enumerate(rows):
        for tried in row.tried:
            by_axis.setdefault(tried.place, {})[series] = tried
    charts = [_tried_chart(place, of_rows) for place, of_rows in sorted(by_axis.items())]
    charts = [of for of in charts if of is not None]
    if not charts:
        return None
    return {"id": "selection", "title": "Choice of values", "charts": charts}


def _tried_chart(place: int, tried: Mapping[int, Tried]) -> Contents | None:
    """Returns the chart of one axis: validation loss by value, a line for each row."""
    lines = {}
    for series, of_row in tried.items():
        known = sorted(
            (value, math.inf if loss is None else loss)
            for value, loss in of_row.losses.items()
            if math.isfinite(value)
        )
        if known:
            values, losses = zip(*known, strict=True)
            lines[series] = {"x": list(values), "y": plain(losses)}
    if not lines:
        return None
    key = next(iter(tried.values())).key
    name = f"selection-{place}" if place else "selection"
    title = Metric(f"Validation loss by {short_name(key)}", "with the selection seed")
    across = {"across": short_name(key), "is_log_across": is_rate(key), "is_scatter": True}
    return chart(name, title, lines, **across)  # type: ignore[arg-type]
