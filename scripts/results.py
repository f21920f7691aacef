"""The numbers and pictures of the documents, from the CSV files of finished runs in docs/results.

`generate_docs.py` writes and checks those of README, RESULTS.md and LOG.md. In a page's source,

    2.887<!-- FILE: a -->                   is the mean test loss of row a of FILE.csv;
    +0.1 (+0.0 to +0.2)<!-- FILE: a - b --> that of a minus b, seed by seed, with its 95 % interval.
                                            More rows may follow, as in a - b - c + d, and a row of
                                            another file is FILE/a;
    0.80 (0.77 to 0.83)<!-- FILE: OTHER/a, tokens -->
                                            is the share of the tokens of row a of OTHER.csv after
                                            which the rows of FILE, that differ in their tokens,
                                            have its loss;
    <!-- results FILE: a=label; b=label --> to
    <!-- end -->                            holds a table of rows, with differences to the first;
    0.0370<!-- FILE: a, rate -->            is the best learning rate of row a: the vertex of a
                                            parabola through the lowest of the validation losses on
                                            seed 1, over log(rate), and its neighbours; that of the
                                            lowest loss if a neighbour diverged;
    <!-- picture FILE: a; one: b=x, c=y; two: d=z -->
                                            comes before the picture results/FILE.svg: distances of
                                            rows b, c and d to a over x, y and z, in two series;
    <!-- rates FILE OTHER: a=label; b=label -->
                                            likewise: validation losses on seed 1 of rows a-hN and
                                            b-hN, for all N, over rates; at an N that FILE has too,
                                            those of OTHER are dashed;
    <!-- slopes FILE: label; label --> to <!-- end -->
                                            holds a table of measurements/FILE.json, which
                                            `switchtitan benchmark coordinates` has written.

`, validation` after a formula of losses takes the validation loss. Values are chosen on seed 1, and
reported on the others; a@4e-3 is row a on seed 1 with this learning rate.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from functools import cache
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import fmean

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from switchtitan.comparison.statistics import LEVEL, Difference, adjusted, difference

FOLDER = Path(__file__).parents[1] / "docs" / "results"

_SIGNED = r"[-+]\d\.\d{3}"
_NUMBER = re.compile(
    rf"(?:\d\.\d{{3}}|{_SIGNED} \((?:{_SIGNED} to {_SIGNED}|one seed)\))"
    r"<!-- (?P<file>\w+): (?P<formula>[^,>]+?)(?P<validation>, validation)? -->"
)
_SHARE = re.compile(
    r"\d\.\d{2} \(\d\.\d{2} to \d\.\d{2}\)<!-- (?P<file>\w+): (?P<row>[^,>]+), tokens -->"
)
_RATE = re.compile(r"\d\.\d{4}(?: or (?:more|less))?<!-- (?P<file>\w+): (?P<row>[^,>]+), rate -->")
_FORMULA = re.compile(r"<!-- \w+: [^>]+ -->")
_TABLE = re.compile(r"<!-- results (?P<file>\w+): (?P<rows>[^>]+) -->\n.*?<!-- end -->", re.DOTALL)
_COLUMNS = (
    "",
    "test loss",
    "minus the first row's",
    "on validation",
    "state, MiB",
    "trained",
    "lr",
    "other_lr",
)
_PICTURE = re.compile(r"<!-- picture (?P<file>\w+): (?P<baseline>\S+); (?P<series>[^>]+) -->")
_RATES = re.compile(r"<!-- rates (?P<file>\w+) (?P<others>[\w ]*): (?P<rows>[^>]+) -->")
WIDTHS = 64, 128, 256, 512
_SLOPES = re.compile(r"<!-- slopes (?P<file>\w+): (?P<rows>[^>]+) -->\n.*?<!-- end -->", re.DOTALL)
_HIGHEST = 0.4
"""Of the losses in the picture of rates, above the lowest of a width."""


def with_results(text: str) -> str:
    """Returns the page with all its numbers computed again.

    Raises:
        ValueError: a formula has no number of its form before it, or names a row without a
            finished run or with several of a seed, rows that share no seed, or a row whose loss is
            outside those that give it tokens.
    """
    computed = {match.end() for form in (_NUMBER, _SHARE, _RATE) for match in form.finditer(text)}
    for match in _FORMULA.finditer(text):
        if match.end() not in computed:
            raise ValueError(f"{match[0]}: expected a number of its form before it")
    text = _SLOPES.sub(_slope_table, _TABLE.sub(_table, text))
    return _RATE.sub(_rate, _SHARE.sub(_share, _NUMBER.sub(_number, text)))


def pictures(text: str) -> dict[Path, str]:
    """Returns the SVG of each picture that the page shows, by its file.

    Raises:
        ValueError: as `with_results`.
    """
    return {
        FOLDER / f"{match['file']}.svg": draw(match)
        for form, draw in ((_PICTURE, _picture), (_RATES, _rates_picture))
        for match in form.finditer(text)
    }


def _number(match: re.Match[str]) -> str:
    split = "validation_loss" if match["validation"] else "test_loss"
    first, *others = match["formula"].split()
    if others:
        signs = [1, *(1 if sign == "+" else -1 for sign in others[::2])]
        terms = [_losses(match["file"], row, split) for row in (first, *others[1::2])]
        value = _sum(terms, signs).text("+.3f")
    else:
        value = f"{fmean(_losses(match['file'], first, split).values()):.3f}"
    return value + match[0][match[0].index("<!--") :]


def _share(match: re.Match[str]) -> str:
    """Interpolates log(tokens) between the losses of FILE's rows, seed by seed."""
    file, row = match["file"], match["row"]
    names = dict.fromkeys(run["row"] for run in _runs(file))
    budgets = [(_losses(file, name, "test_loss"), _tokens(file, name)) for name in names]
    row_losses, shares = _losses(file, row, "test_loss"), {}
    for seed in set(row_losses).intersection(*(losses for losses, _ in budgets)):
        loss = row_losses[seed]
        tokens = {losses[seed]: log(number) for losses, number in budgets}
        if not min(tokens) <= loss <= max(tokens):
            raise ValueError(f"docs/results/{file}.csv: no row has so low or high a loss as {row}")
        found = exp(np.interp(loss, sorted(tokens), [tokens[of] for of in sorted(tokens)]))
        shares[seed] = found / _tokens(file, row)
    return _sum([shares], [1]).text(".2f") + match[0][match[0].index("<!--") :]


def _rate(match: re.Match[str]) -> str:
    losses = _losses_by_rate(match["file"], match["row"])
    rates = sorted(losses)
    best = min(rates, key=losses.__getitem__)
    place, end = rates.index(best), ""
    three = rates[max(0, place - 1) : place + 2]
    if len(three) < 3:
        end = " or less" if best == rates[0] else " or more"
    elif isfinite(sum(losses[rate] for rate in three)):
        a, b, _ = np.polyfit(np.log(three), [losses[rate] for rate in three], 2)
        best = exp(-b / (2 * a))
    return f"{best:.4f}{end}{match[0][match[0].index('<!--') :]}"


def _losses_by_rate(file: str, row: str) -> dict[float, float]:
    """Returns the validation losses of a row's runs on seed 1; inf if they diverged."""
    runs = [run for run in _runs(file) if run["row"] == row and run["seed"] == "1"]
    found = {float(run["optimizer.lr"]): float(run["validation_loss"]) for run in runs}
    return {rate: loss if isfinite(loss) else inf for rate, loss in found.items()}


def _table(match: re.Match[str]) -> str:
    file = match["file"]
    titles = dict(row.strip().split("=", 1) for row in match["rows"].split(";"))
    baseline, *others = titles
    columns = [
        _cells({row: _difference(file, row, baseline, split) for row in others})
        for split in ("test_loss", "validation_loss")
    ]
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for row, title in titles.items():
        run = _reported(file, row)[0]
        lines.append(
            (
                title,
                f"{fmean(_losses(file, row, 'test_loss').values()):.3f}",
                *(cells.get(row, "-") for cells in columns),
                f"{float(run['state_gib']) * 1024:.1f}",
                f"{int(run['num_trainable']) / 1e6:.2f} M",
                f"{float(run['optimizer.lr']):g}",
                f"{float(run['optimizer.other_lr']):g}" if run.get("optimizer.other_lr") else "-",
            )
        )
    # A key that was not tuned has no value in the file.
    filled = [column for column in zip(*lines, strict=True) if set(column[1:]) != {"-"}]
    head, *body = zip(*filled, strict=True)
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"<!-- results {file}: {match['rows']} -->\n\n{table}\n\n<!-- end -->"


def _slope_table(match: re.Match[str]) -> str:
    """A row for each label and configuration; the exponents of linear layers are a range."""
    found = json.loads((FOLDER.parent / "measurements" / f"{match['file']}.json").read_text())
    lines = [
        "|  | residual stream | linear layers | head | embedding |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    labels = [label.strip() for label in match["rows"].split(";")]
    for label, of in zip(labels, found["slopes"].values(), strict=True):
        others = ["residual stream", "lm_head", "embed_tokens"]
        layers = sorted(value for name, value in of.items() if name not in others)
        stream, head, embedding = (f"{of[name]:+.2f}" for name in others)
        span = f"{layers[0]:+.2f} to {layers[-1]:+.2f}"
        lines.append(f"| {label} | {stream} | {span} | {head} | {embedding} |")
    table = "\n".join(lines)
    return f"<!-- slopes {match['file']}: {match['rows']} -->\n\n{table}\n\n<!-- end -->"


def _picture(match: re.Match[str]) -> str:
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="grey", linewidth=1)
    for series in match["series"].split("; "):
        label, rows = series.split(": ")
        points = dict(point.split("=") for point in rows.split(", "))
        found = [_difference(match["file"], row, match["baseline"], "test_loss") for row in points]
        shares, means = [float(share) for share in points.values()], [of.mean for of in found]
        errors = [of.half_width or 0.0 for of in found]
        axes.errorbar(shares, means, errors, fmt="o-", capsize=3, label=label)
    axes.set(xlabel="share of directions that a step can move", xlim=(0, 1.05))
    axes.set(ylabel="test loss minus full rank's")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _svg(figure, match["file"])


def _rates_picture(match: re.Match[str]) -> str:
    methods = dict(row.strip().split("=", 1) for row in match["rows"].split(";"))
    files = match["file"], *match["others"].split()
    figure = Figure((3 * len(methods), 3), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True)
    for axes, (method, label) in zip(panels, methods.items(), strict=True):
        tried = set[float]()
        for place, width in enumerate(WIDTHS):
            losses = {file: _losses_by_rate(file, f"{method}-h{width}") for file in files}
            lowest = min((loss for of in losses.values() for loss in of.values()), default=0.0)
            first = next((file for file, of in losses.items() if of), None)
            for file, of in losses.items():
                rates = sorted(of)
                tried |= of.keys()
                above = [of[rate] - lowest for rate in rates]
                style, name = ("o-", f"hidden {width}") if file == first else ("x--", None)
                if rates:
                    axes.plot(rates, above, style, color=f"C{place}", label=name, markersize=4)
        axes.set(xscale="log", xlabel="lr", title=label, ylim=(-0.01, _HIGHEST))
        axes.minorticks_off()
        axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="loss above the width's lowest")
    panels[0].legend(frameon=False)
    return _svg(figure, match["file"])


def _svg(figure: Figure, name: str) -> str:
    stream = io.StringIO()
    # Equal text for equal numbers.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _cells(differences: Mapping[str, Difference]) -> dict[str, str]:
    """Returns each row's difference, bold if it is not zero after Holm's correction over them."""
    p_values = adjusted({row: of.p for row, of in differences.items()})
    bold = {row: "**" if p_values.get(row, 1.0) < LEVEL else "" for row in differences}
    return {row: f"{bold[row]}{of.text('+.3f')}{bold[row]}" for row, of in differences.items()}


def _difference(file: str, row: str, baseline: str, split: str) -> Difference:
    return _sum([_losses(file, row, split), _losses(file, baseline, split)], [1, -1])


def _sum(terms: list[dict[int, float]], signs: list[int]) -> Difference:
    """Returns the signed sum of losses by seed."""
    seeds = set.intersection(*(set(term) for term in terms))
    sums = {
        seed: sum(sign * term[seed] for sign, term in zip(signs, terms, strict=True))
        for seed in seeds
    }
    found = difference(sums, dict.fromkeys(sums, 0.0))
    if found is None:
        raise ValueError("docs/results: rows of a formula share no seed, or a run diverged")
    return found


def _losses(file: str, row: str, split: str) -> dict[int, float]:
    """Returns the losses of a row's reported runs by seed."""
    runs = _reported(file, row)
    losses = {int(run["seed"]): float(run[split]) for run in runs}
    if len(losses) != len(runs):
        raise ValueError(f"docs/results: {file}: row {row} has several runs of a seed")
    return losses


def _tokens(file: str, row: str) -> int:
    return int(_reported(file, row)[0]["tokens"])


def _reported(file: str, row: str) -> list[dict[str, str]]:
    """Returns a row's runs on the seeds that report; `row` may be FILE/row."""
    *other, name = row.split("/")
    file = other[0] if other else file
    name, _, rate = name.partition("@")
    runs = [run for run in _runs(file) if run["row"] == name]
    if rate:
        reported = [
            run for run in runs if run["seed"] == "1" and float(run["optimizer.lr"]) == float(rate)
        ]
    else:
        # Files of earlier comparisons say which runs only served to choose values.
        reported = [
            run for run in runs if run.get("stage", "report") == "report" and run["seed"] != "1"
        ]
    if not reported:
        raise ValueError(f"docs/results/{file}.csv: no finished run of row {name}")
    return reported


@cache
def _runs(file: str) -> list[dict[str, str]]:
    with (FOLDER / f"{file}.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))
