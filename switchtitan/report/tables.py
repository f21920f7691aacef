"""Tables of a report, as its page's code expects them."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Cell = dict[str, object]
UNKNOWN = "–"


class Column(NamedTuple):
    """A column of a table of figures."""

    title: str
    hint: str = ""
    is_text: bool = False


def cell(text: str | None, value: float | str | None = None, hint: str = "") -> Cell:
    """Returns a cell: what is shown, and what it is sorted by."""
    is_known = not isinstance(value, float) or math.isfinite(value)
    return {
        "text": UNKNOWN if text is None else text,
        "value": value if is_known else None,
        "hint": hint or None,
    }


def number_cell(value: float | None, form: str, scale: float = 1.0, hint: str = "") -> Cell:
    """Returns a cell with a number in a format of Python, e.g. ".4f"."""
    return cell(None) if value is None else cell(format(value * scale, form), value, hint)


def text_cell(text: str | None) -> Cell:
    """Returns a cell sorted by its text."""
    return cell(text, text)


def mark_lowest(cells: Sequence[Cell]) -> None:
    """Marks the lowest value of a column, if there are several."""
    values = [value for of in cells if isinstance(value := of["value"], int | float)]
    if len(values) > 1 and min(values) < max(values):
        for of in cells:
            of["isBest"] = of["value"] == min(values)


def without_unknown(columns: Mapping[Column, Sequence[Cell]]) -> dict[Column, Sequence[Cell]]:
    """Returns the columns in which at least one cell is known."""
    return {
        column: cells
        for column, cells in columns.items()
        if any(of["text"] != UNKNOWN for of in cells)
    }


def table(
    title: str,
    columns: Mapping[Column, Sequence[Cell]],
    series: Sequence[int | None],
    names: Sequence[str] | None = None,
    rows_title: str = "run",
) -> dict[str, object]:
    """Returns a table from its columns.

    Args:
        columns: cells from top to bottom.
        series: the run or row of the report that each line is about, or None.
        names: names of the lines; default: those of their runs.
    """
    return {
        "title": title,
        "rowsTitle": rows_title,
        "columns": [
            {"title": column.title, "hint": column.hint or None, "isText": column.is_text}
            for column in columns
        ],
        "rows": [
            {
                "series": place,
                "name": None if names is None else names[line],
                "cells": [cells[line] for cells in columns.values()],
            }
            for line, place in enumerate(series)
        ],
    }
