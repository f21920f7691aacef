"""The numbers of the documents, from the CSV files of finished runs in docs/results.

`generate_docs.py` writes and checks those of README and the pages of results. In a page's source,

    2.887<!-- FILE: a -->                   is the mean test loss of row a of FILE.csv;
    +0.1 (+0.0 to +0.2)<!-- FILE: a - b --> that of a minus b, seed by seed, with its 95 % interval.
                                            More rows may follow, as in a - b - c + d, and a row of
                                            another file is FILE/a;
    0.80 (0.77 to 0.83)<!-- FILE: OTHER/a, tokens -->
                                            is the share of the tokens of row a of OTHER.csv after
                                            which the rows of FILE, that differ in their tokens,
                                            have its loss;
    0.0370<!-- FILE: a, rate -->            is the best learning rate of row a: the vertex of a
                                            parabola through the lowest of the validation losses on
                                            seed 1, over log(rate), and its neighbours; that of the
                                            lowest loss if a neighbour diverged;
    <!-- slopes FILE: label; label --> to <!-- end -->
                                            holds a table of measurements/FILE.json, which
                                            `switchtitan benchmark coordinates` has written.

`, validation` after a formula of losses takes the validation loss. Values are chosen on seed 1, and
reported on the others; a@4e-3 is row a on seed 1 with this learning rate.
"""

import csv
import json
import re
from functools import cache
from math import exp, inf, isfinite, log
from pathlib import Path
from statistics import fmean

import numpy as np

from switchtitan.workbench.comparison.statistics import Difference, difference

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
_SLOPES = re.compile(r"<!-- slopes (?P<file>\w+): (?P<rows>[^>]+) -->\n.*?<!-- end -->", re.DOTALL)


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
    text = _SLOPES.sub(_slope_table, text)
    return _RATE.sub(_rate, _SHARE.sub(_share, _NUMBER.sub(_number, text)))


def _number(match: re.Match[str]) -> str:
    split = "validation_loss" if match["validation"] else "test_loss"
    first, *others = match["formula"].split()
    if others:
        signs = [1, *(1 if sign == "+" else -1 for sign in others[::2])]
        terms = [losses_by_seed(match["file"], row, split) for row in (first, *others[1::2])]
        value = _sum(terms, signs).text("+.3f")
    else:
        value = f"{fmean(losses_by_seed(match['file'], first, split).values()):.3f}"
    return value + match[0][match[0].index("<!--") :]


def _share(match: re.Match[str]) -> str:
    """Interpolates log(tokens) between the losses of FILE's rows, seed by seed."""
    file, row = match["file"], match["row"]
    budgets = [
        (losses_by_seed(file, name, "test_loss"), num_tokens(file, name))
        for name in row_names(file)
    ]
    row_losses, shares = losses_by_seed(file, row, "test_loss"), {}
    for seed in set(row_losses).intersection(*(losses for losses, _ in budgets)):
        loss = row_losses[seed]
        tokens = {losses[seed]: number for losses, number in budgets}
        shares[seed] = tokens_at_loss(loss, tokens, f"{file}.csv: {row}") / num_tokens(file, row)
    return _sum([shares], [1]).text(".2f") + match[0][match[0].index("<!--") :]


def tokens_at_loss(loss: float, tokens: dict[float, int], row: str) -> float:
    """Interpolates log(tokens) between the losses of rows; `row` is the one that has this loss.

    Raises:
        ValueError: no row has so low or high a loss.
    """
    losses = sorted(tokens)
    if not losses[0] <= loss <= losses[-1]:
        raise ValueError(f"docs/results/{row}: no row has so low or high a loss")
    return exp(np.interp(loss, losses, [log(tokens[of]) for of in losses]))


def _rate(match: re.Match[str]) -> str:
    losses = losses_by_rate(match["file"], match["row"])
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


def losses_by_rate(file: str, row: str) -> dict[float, float]:
    """Returns the validation losses of a row's runs on seed 1; inf if they diverged."""
    runs = [run for run in _runs(file) if run["row"] == row and run["seed"] == "1"]
    found = {float(run["optimizer.lr"]): float(run["validation_loss"]) for run in runs}
    return {rate: loss if isfinite(loss) else inf for rate, loss in found.items()}


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


def row_difference(file: str, row: str, baseline: str, split: str) -> Difference:
    """Returns the loss of a row minus the baseline's, paired by seed."""
    return _sum([losses_by_seed(file, row, split), losses_by_seed(file, baseline, split)], [1, -1])


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


def losses_by_seed(file: str, row: str, split: str) -> dict[int, float]:
    """Returns the losses of a row's reported runs by seed."""
    runs = reported_runs(file, row)
    losses = {int(run["seed"]): float(run[split]) for run in runs}
    if len(losses) != len(runs):
        raise ValueError(f"docs/results: {file}: row {row} has several runs of a seed")
    return losses


def row_names(file: str) -> list[str]:
    return list(dict.fromkeys(run["row"] for run in _runs(file)))


def num_tokens(file: str, row: str) -> int:
    return int(reported_runs(file, row)[0]["tokens"])


def reported_runs(file: str, row: str) -> list[dict[str, str]]:
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
