"""The pictures of the documents, from the CSV files of finished runs and the records of estimates.

`generate_docs.py` writes and checks them. In a page's source, one comment declares a picture:

    <!-- picture FILE: a; one: b=x, c=y; two: d=z -->
                        results/FILE.svg: distances of rows b, c and d to a over x, y and z, in two
                        series; rows are those of results/FILE.csv, or OTHER/row;
    <!-- rates FILE OTHER: a=label; b=label -->
                        results/FILE.svg: validation losses on seed 1 of rows a-hN and b-hN, for all
                        N, over rates; at an N that FILE has too, those of OTHER are dashed;
    <!-- forest NAME: FILE=label; FILE=label | a; b=label; c=label -->
                        pictures/NAME.svg: distances of rows b and c to a, in each file that has
                        them;
    <!-- state NAME: FILE | a; one: b=label, c=label; two: d=label -->
                        pictures/NAME.svg: distances of rows b, c and d to a over their state;
    <!-- tokens NAME: FILE | one: a, b, c; d=label; OTHER/e=label -->
                        pictures/NAME.svg: losses over tokens, rows a to c as a line;
    <!-- memory NAME: FILE=1B; FILE=7B | label; -; label -->
                        pictures/NAME.svg: peaks in the records measurements/FILE.json of
                        `switchtitan estimate`, of all configurations in order, each with its
                        label; - is left out;
    <!-- bounds NAME: FILE=label; FILE=label | method; method -->
                        pictures/NAME.svg: ratios of bounds in measurements/FILE.json to the first
                        row's, of rows "method, rank N", the higher rank first.

Pictures have a card of their own, so that they can be read on light and on dark pages. Bars are
95 % intervals of the mean over seeds, paired.
"""

import io
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import (
    FOLDER,
    losses_by_rate,
    losses_by_seed,
    num_tokens,
    reported_runs,
    row_difference,
    row_names,
    tokens_at_loss,
)

DOCS = FOLDER.parent
WIDTHS = 64, 128, 256, 512
_HIGHEST = 0.4
"""Of the losses in the picture of rates, above the lowest of a width."""
CARDS = "H100 SXM", "A100 80GB SXM"
"""GPUs whose bounds pages show."""
_SIZES_GIB = 16, 24, 40, 80
"""Memory of GPUs, as lines."""
_GIB = 2**30
# Okabe and Ito's, which people with a colour vision deficiency tell apart.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_GREY = "#555555"
_CARD = "#f6f6f6"
_SMALL: dict[str, Any] = {"textcoords": "offset points", "size": 9}
_COVER: dict[str, Any] = {
    "va": "center",
    "bbox": {"facecolor": _CARD, "edgecolor": "none", "pad": 0.5},
}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GREY,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=_COLORS, marker=_MARKERS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "errorbar.capsize": 3,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": _CARD,
    "grid.color": "#d2d2d2",
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.facecolor": _CARD,
    "svg.fonttype": "none",
}


def pictures(text: str) -> dict[Path, str]:
    """Returns the SVG of each picture that the page declares, by its file.

    Raises:
        ValueError: as `results.with_results`, or a picture has an unknown kind, a row without a
            label, or a loss outside of the line over tokens.
    """
    found = {}
    for match in re.finditer(r"<!-- (?P<kind>\w+) (?P<name>\w+)(?P<rest>[^>]*) -->", text):
        if match["kind"] in _TABLES:
            continue
        if match["kind"] not in _DRAWN:
            raise ValueError(f"{match[0]}: expected one of {', '.join(_DRAWN)}")
        folder, draw = _DRAWN[match["kind"]]
        # Equal text for equal numbers.
        with mpl.rc_context({**_STYLE, "svg.hashsalt": match["name"]}):
            figure = draw(match["name"], match["rest"])
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        lines = (line.rstrip() for line in stream.getvalue().splitlines())
        found[DOCS / folder / f"{match['name']}.svg"] = "\n".join(lines) + "\n"
    return found


def _parts(rest: str) -> list[list[str]]:
    """Splits a declaration's text after its name: `: a; b | c` is [[a, b], [c]]."""
    return [
        [item.strip() for item in part.split(";")] for part in rest.partition(":")[2].split("|")
    ]


def _labels(items: list[str]) -> dict[str, str]:
    return dict(item.split("=", 1) for item in items)


def _series(item: str) -> tuple[str, dict[str, str]]:
    """Splits `label: a=x, b=y`."""
    label, rows = item.split(": ")
    return label, dict(row.split("=") for row in rows.split(", "))


def _distances(
    axes: Axes, file: str, baseline: str, rows: list[str], x: list[float], **kw: Any
) -> list[float]:
    """Plots distances to the baseline with their intervals, and returns them."""
    found = [row_difference(file, row, baseline, "test_loss") for row in rows]
    means = [of.mean for of in found]
    axes.errorbar(x, means, [of.half_width or 0.0 for of in found], **kw)
    return means


def _over_directions(file: str, rest: str) -> Figure:
    (baseline, *all_series), *_ = _parts(rest)
    figure = Figure((7, 4))
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=1)
    for item in all_series:
        label, rows = _series(item)
        shares = [float(share) for share in rows.values()]
        _distances(axes, file, baseline, list(rows), shares, linestyle="-", label=label)
    axes.set(xlabel="share of directions that a step can move", xlim=(0, 1.05))
    axes.set(ylabel="test loss minus full rank's")
    axes.legend()
    return figure


def _over_rates(file: str, rest: str) -> Figure:
    (items,) = _parts(rest)
    methods = _labels(items)
    files = file, *rest.partition(":")[0].split()
    figure = Figure((3 * len(methods), 3))
    panels = figure.subplots(1, len(methods), sharey=True)
    for axes, (method, label) in zip(panels, methods.items(), strict=True):
        tried = set[float]()
        for place, width in enumerate(WIDTHS):
            losses = {file: losses_by_rate(file, f"{method}-h{width}") for file in files}
            lowest = min((loss for of in losses.values() for loss in of.values()), default=0.0)
            first = next((file for file, of in losses.items() if of), None)
            for file, of in losses.items():
                rates = sorted(of)
                tried |= of.keys()
                above = [of[rate] - lowest for rate in rates]
                style, name = ("o-", f"hidden {width}") if file == first else ("x--", None)
                if rates:
                    axes.plot(rates, above, style, color=_COLORS[place], label=name, markersize=4)
        axes.set(xscale="log", xlabel="lr", title=label, ylim=(-0.01, _HIGHEST))
        axes.minorticks_off()
        axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
    panels[0].set(ylabel="loss above the width's lowest")
    panels[0].legend()
    return figure


def _forest(_: str, rest: str) -> Figure:
    files, (baseline, *items) = _parts(rest)
    corpora, rows = _labels(files), _labels(items)
    figure = Figure((7, 0.62 * len(rows) + 1.1))
    axes = figure.subplots()
    axes.axvline(0, color=_GREY, linewidth=1)
    for place in range(0, len(rows), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#e9e9e9", linewidth=0)
    for number, (file, label) in enumerate(corpora.items()):
        known = row_names(file)
        places = [place for place, row in enumerate(rows) if row in known]
        found = [row_difference(file, row, baseline, "test_loss") for row in rows if row in known]
        axes.errorbar(
            [of.mean for of in found],
            [place + 0.25 * (number - (len(corpora) - 1) / 2) for place in places],
            xerr=[of.half_width or 0.0 for of in found],
            linestyle="",
            label=label,
        )
    axes.set_yticks(range(len(rows)), [textwrap.fill(label, 24) for label in rows.values()])
    axes.set(
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="test loss minus that of full rank with AdamW, nats\n"
        "(left is better; bars are 95 % intervals)",
    )
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside upper right", ncols=len(corpora))
    return figure


def _over_state(_: str, rest: str) -> Figure:
    ((file,), (baseline, *all_series)) = _parts(rest)
    figure = Figure((7, 4.2))
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=1)
    for item in all_series:
        label, rows = _series(item)
        state = [1024 * float(reported_runs(file, row)[0]["state_gib"]) for row in rows]
        means = _distances(axes, file, baseline, list(rows), state, linestyle="-", label=label)
        # Names of the first series are left of their points, so that they do not meet others.
        align, place = ("right", (-6, -11)) if item == all_series[0] else ("left", (6, 4))
        for x, y, name in zip(state, means, rows.values(), strict=True):
            axes.annotate(name, (x, y), place, **_SMALL, ha=align, color=_GREY)
    axes.set(xlabel="state in a checkpoint, MiB (weights and optimizer state, fp32)")
    axes.set(ylabel="test loss minus that of\nfull rank with AdamW, nats")
    axes.margins(x=0.13)
    axes.legend(loc="lower right")
    return figure


def _over_tokens(_: str, rest: str) -> Figure:
    ((file,), (line, *items)) = _parts(rest)
    figure = Figure((7, 4.2))
    axes = figure.subplots()
    label, names = line.split(": ")
    rows = names.split(", ")
    tokens = {_mean_loss(file, row): num_tokens(file, row) for row in rows}
    millions = [number / 1e6 for number in tokens.values()]
    axes.plot(millions, list(tokens), color=_COLORS[-1], marker=_MARKERS[-1], label=label)
    for row, name in _labels(items).items():
        x, y = num_tokens(file, row) / 1e6, _mean_loss(file, row)
        reached = tokens_at_loss(y, tokens, f"{file}.csv: {row}") / 1e6
        (drawn,) = axes.plot(x, y, linestyle="", markersize=7)
        axes.plot([x, reached], [y, y], ":", marker="", color=drawn.get_color())
        align, place = ("left", (9, 0)) if reached < x else ("right", (-9, 0))
        text = f"{name}: {y:.3f}"
        axes.annotate(text, (x, y), place, **_SMALL, ha=align, va="center")
    axes.set(xscale="log", xlabel="tokens, millions", ylabel="test loss, nats per token")
    axes.minorticks_off()
    axes.set_xticks(millions, [f"{of:.2f}" for of in millions])
    axes.legend()
    return figure


def _memory(_: str, rest: str) -> Figure:
    files, labels = _parts(rest)
    figure = Figure((7, 0.235 * (len(labels) - labels.count("-")) * len(files) + 1.9))
    axes = figure.subplots()
    gap = len(labels) - labels.count("-") + 1
    sizes = _labels(files)
    for group, size in enumerate(sizes):
        peaks = zip(labels, _peaks(size), strict=True)
        for place, (label, peak) in enumerate(of for of in peaks if of[0] != "-"):
            y = group * gap + place
            axes.barh(y, peak, 0.85, color=_COLORS[place], label=label if group == 0 else None)
            axes.annotate(f"{peak:.1f}", (peak, y), (4, 0), **_SMALL, **_COVER)
    for gib in _SIZES_GIB:
        axes.axvline(gib, color=_GREY, linestyle="--", linewidth=1)
        axes.text(gib, -1.1, f"{gib} GiB", ha="center", color=_GREY, size=9)
    axes.set_yticks([group * gap + (gap - 2) / 2 for group in range(len(sizes))], sizes.values())
    axes.set(ylim=(gap * len(sizes) - 1.2, -0.9), xscale="log", xlabel="peak, GiB")
    axes.minorticks_off()
    ticks = (1, 2, 4, 8, 16, 32, 64, 128)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(1)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    figure.suptitle("Estimated, not measured", size="medium")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _bounds(_: str, rest: str) -> Figure:
    files, methods = _parts(rest)
    sizes = _labels(files)
    figure = Figure((7, 3.9))
    panels = figure.subplots(1, len(CARDS), sharey=True)
    records = [_record(file) for file in sizes]
    for axes, card in zip(panels, CARDS, strict=True):
        axes.axhline(1, color=_GREY, linewidth=1)
        for number, method in enumerate(methods):
            ratios = [bound_ratios(record, method, card) for record in records]
            places = np.arange(len(sizes)) + 0.14 * (number - (len(methods) - 1) / 2)
            for share, of in zip(("hidden/4", "hidden/8"), zip(*ratios, strict=True), strict=True):
                face = None if share == "hidden/4" else _CARD
                axes.plot(
                    places,
                    of,
                    color=_COLORS[number],
                    marker=_MARKERS[number],
                    markerfacecolor=face,
                    linestyle="-" if face is None else "--",
                    linewidth=1,
                    label=f"{method}, {share}",
                )
        axes.set(title=card)
        labels = [label.replace(", ", "\n") for label in sizes.values()]
        axes.set_xticks(range(len(sizes)), labels, size=9)
    panels[0].set(ylabel="least time of a step,\nratio to full rank with AdamW")
    figure.suptitle("Computed, not measured", size="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def bound_ratios(record: dict[str, Any], method: str, card: str) -> list[float]:
    """Returns bounds of a method's rows, divided by the first row's, highest rank first."""
    rows = list(record["rows"].values())
    found = [row for row in rows if row["name"].startswith(f"{method}, rank ")]
    found.sort(key=lambda row: -int(row["name"].split()[-1]))
    return [row["bounds_s"][card] / rows[0]["bounds_s"][card] for row in found]


def _record(file: str) -> dict[str, Any]:
    return json.loads((DOCS / "measurements" / f"{file}.json").read_text())


def _peaks(file: str) -> list[float]:
    """Returns the peaks of all configurations, in GiB."""
    return [of["memory"]["peak"] / _GIB for of in _record(file)["estimates"].values()]


def _mean_loss(file: str, row: str) -> float:
    return fmean(losses_by_seed(file, row, "test_loss").values())


_TABLES = "table", "slopes"
"""What generate_docs.py and results.py write."""
_DRAWN: dict[str, tuple[str, Callable[[str, str], Figure]]] = {
    "picture": ("results", _over_directions),
    "rates": ("results", _over_rates),
    "forest": ("pictures", _forest),
    "state": ("pictures", _over_state),
    "tokens": ("pictures", _over_tokens),
    "memory": ("pictures", _memory),
    "bounds": ("pictures", _bounds),
}
