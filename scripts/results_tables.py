"""The numbers and tables of docs/RESULTS.md as text."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from results_data import Change, Comparison, Versus, adjusted_for, between
from results_laws import Laws
from scipy.stats import rankdata

from switchtitan.comparison.config import LEARNING_RATE
from switchtitan.comparison.plan import short_name
from switchtitan.comparison.statistics import Difference, Share, summarize
from switchtitan.methods.switchlora.config import SwitchLoraConfig

UNKNOWN = "-"
_DIVERGED = "diverged"
_DIGITS = 3
_MIB_PER_GIB = 1024


def interval(of: Versus | Difference) -> str:
    """Returns a difference with its interval."""
    found = of.difference if isinstance(of, Versus) else of
    if not math.isfinite(found.mean):
        return _DIVERGED
    if found.low is None or found.high is None:
        return f"{_signed(found.mean)} (one seed)"
    return f"{_signed(found.mean)} ({_signed(found.low)} to {_signed(found.high)})"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return _DIVERGED
    return f"{value:+.{_DIGITS}f}"  # -0.000 is the end of an interval that does not hold zero


def percent(share: Share | None) -> str:
    """Returns a share with its interval."""
    if share is None:
        return UNKNOWN
    if share.low is None or share.high is None:
        return f"{100 * share.mean:.0f} % (one seed)"
    return f"{100 * share.mean:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f} %)"


def p_value(of: Versus) -> str:
    """Returns the adjusted p-value of a difference: `p 0.012`, or `p < 0.001`; `-` of one seed."""
    if of.adjusted_p is None:
        return UNKNOWN
    smallest = 10.0**-_DIGITS
    is_small = of.adjusted_p < smallest
    return f"p < {smallest:g}" if is_small else f"p {of.adjusted_p:.{_DIGITS}f}"


def number(value: float, digits: int = _DIGITS) -> str:
    """Returns a number with a fixed number of decimals."""
    return f"{value:.{digits}f}"


def mean(values: Sequence[float], digits: int = _DIGITS) -> str:
    """Returns mean and standard deviation."""
    of = summarize(values)
    if not math.isfinite(of.mean):
        return _DIVERGED
    return f"{of.mean:.{digits}f}" + (f" ± {of.std:.{digits}f}" if of.std is not None else "")


def millions(value: float) -> str:
    """Returns a number in millions."""
    return f"{value / 1e6:.2f} M"


def in_words(numbers: Sequence[float]) -> str:
    """Returns numbers with their decimals, as words: `1.250 and 2.000`."""
    return _words([number(value) for value in numbers])


def seeds(of: Comparison) -> str:
    """Returns the seeds of a comparison as words: `2, 3 and 4`."""
    return _words(of.seeds)


def missing(of: Comparison) -> str:
    """Returns the declared seeds of which a row has no run, in words; empty if there is none."""
    found = of.missing_seeds
    return f" (not finished: {_words(found)})" if found else ""


def _words(numbers: Sequence[object]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def results_table(of: Comparison) -> str:
    """Returns the table of a comparison: values of tuned keys, loss, distances to the baseline.

    Distances that differ from zero after Holm's correction are bold.
    """
    baseline = of.title(of.baseline)
    keys = dict.fromkeys(of.declared.axes)
    header = ["", *map(short_name, keys), "test loss"]
    header += [f"test loss minus {baseline}'s", f"validation loss minus {baseline}'s"]
    lines = []
    for row in of.rows:
        cells = [of.title(row), *(_value(of, row, key) for key in keys)]
        cells.append(mean_loss(of, row))
        cells += [_cell(of, row, of.baseline, split) for split in ("test", "validation")]
        lines.append(cells)
    return _table(header, lines)


def ablation_table(of: Comparison, rows: Sequence[str]) -> str:
    """Returns the table of SwitchLoRA's keys: the baseline, and `rows` minus the baseline.

    p-values are adjusted over `rows`.
    """
    header = ["", "switches of a vector", "test loss"]
    header += ["test loss minus published keys'", "validation loss minus published keys'"]
    lines = []
    for row in (of.baseline, *rows):
        cells = [of.title(row), num_switches(of, row), mean_loss(of, row)]
        cells += [_cell(of, row, of.baseline, split, rows) for split in ("test", "validation")]
        lines.append(cells)
    return _table(header, lines)


def overview_table(
    rows: Mapping[str, tuple[Comparison, str, Comparison]], others: Sequence[Comparison]
) -> str:
    """Returns rows of several comparisons by their distance to full rank, the best one first.

    Args:
        rows: name in the first column -> comparison, row, and the comparison with full rank's runs
            of the same seeds.
        others: have some of the rows on another corpus; the first that has a row is taken.
    """
    distances = {
        title: between(of, row, base, base.baseline) for title, (of, row, base) in rows.items()
    }
    header = ["", "trained", "state, MiB", "rank", "Python code", "English prose"]
    lines = []
    for title in sorted(rows, key=lambda title: distances[title].mean):
        of, row, _ = rows[title]
        cells = [title, *_size(of, row), _comparable_rank(of, row)]
        if row == of.baseline:
            cells += [UNKNOWN, UNKNOWN]
        else:
            cells.append(interval(distances[title]))
            other = next((other for other in others if row in other.rows), None)
            cells.append("" if other is None else interval(other.minus(row, other.baseline)))
        lines.append(cells)
    return _table(header, lines)


def _comparable_rank(of: Comparison, row: str) -> str:
    """Returns the mean effective rank of the change, unless the row has a model of another kind, in
    whose layers a rank means something else."""
    names = {of.config(each).model.name for each in (row, of.baseline)}
    return f"{summarize(of.values(row, 'effective_rank')).mean:.1f}" if len(names) == 1 else UNKNOWN


def changes_table(changed: Mapping[str, Sequence[Change]]) -> str:
    """Returns how the distances of rows change, in bold where they do.

    Args:
        changed: heading -> changes of the same rows.
    """
    columns = list(changed.values())
    lines = [
        [row[0].title, *(_bold(interval(of.change), of.change.differs) for of in row)]
        for row in zip(*columns, strict=True)
    ]
    return _table(["", *changed], lines)


def cost_table(reported: Path, *comparisons: Comparison) -> str:
    """Returns what the rows of comparisons train and store, and the rank of what they change.

    A row that several comparisons have is taken from the first.

    Args:
        reported: CSV file of effective ranks of comparisons whose own file does not have them.
    """
    with reported.open(newline="", encoding="utf-8") as stream:
        known = list(csv.DictReader(stream))
    header = ["", "rank", "trained parameters", "state, MiB", "effective rank of the change"]
    lines: list[list[str]] = []
    for of in comparisons:
        for row in of.rows:
            rank = getattr(of.config(row).method, "rank", None)
            cells = [of.title(row), UNKNOWN if rank is None else str(rank)]
            if any(cells == line[:2] for line in lines):
                continue
            cells += [*_size(of, row), _effective_rank(known, of, row)]
            lines.append(cells)
    return _table(header, lines)


def size_table(of: Comparison, methods: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """Returns the distances to full rank at several sizes, a column each.

    p-values are adjusted over the methods, at each size by itself.

    Args:
        methods: name in the first column -> start of the rows' names. The first one is full rank,
            whose losses are given instead.
        settings: heading -> end of the rows' names.
    """
    full, *others = methods.values()
    lines = [
        ["full rank's test loss", *(mean_loss(of, f"{full}-{end}") for end in settings.values())]
    ]
    for title, start in list(methods.items())[1:]:
        cells = [
            _cell(
                of, f"{start}-{end}", f"{full}-{end}", "test", [f"{name}-{end}" for name in others]
            )
            for end in settings.values()
        ]
        lines.append([title, *cells])
    return _table(["", *settings], lines)


def budget_table(of: Comparison, budgets: Mapping[str, Sequence[str]]) -> str:
    """Returns rows that share a budget with another row: what they train, and their distance to
    the baseline.

    p-values are adjusted over all rows of the table.

    Args:
        budgets: what rows share, and with which row -> such rows.
    """
    header = ["", "the same", "tokens", "trained", "state, MiB", "test loss"]
    header.append(f"minus {of.title(of.baseline)}'s")
    family = [row for rows in budgets.values() for row in rows]
    lines = []
    for budget, rows in {UNKNOWN: [of.baseline], **budgets}.items():
        for row in rows:
            cells = [of.title(row), budget, millions(of.num_tokens_of(row)), *_size(of, row)]
            cells += [mean_loss(of, row), _cell(of, row, of.baseline, "test", family)]
            lines.append(cells)
    return _table(header, lines)


def _size(of: Comparison, row: str) -> list[str]:
    """Returns the trained parameters of a row, and its state in MiB."""
    state = max(of.values(row, "state_gib")) * _MIB_PER_GIB
    return [millions(max(of.values(row, "num_trainable"))), f"{state:.1f}"]


def rate_table(of: Comparison, methods: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """Returns learning rates at several sizes: of treated weights, and of all others.

    Args:
        methods, settings: as in `size_table`.
    """
    keys = (LEARNING_RATE, "optimizer.other_lr")
    lines = [
        [
            title,
            *(
                ", ".join(_value(of, f"{start}-{end}", key) for key in keys)
                for end in settings.values()
            ),
        ]
        for title, start in methods.items()
    ]
    return _table(["lr, other_lr", *settings], lines)


def distance_table(changes: Mapping[str, Mapping[str, Difference]]) -> str:
    """Returns how distances to full rank change, in bold where they do.

    p-values are adjusted over the rows, in each column by itself.

    Args:
        changes: heading -> row -> change.
    """
    columns = [adjusted_for(of) for of in changes.values()]
    lines = [
        [row, *(_bold(interval(of[row]), of[row].differs) for of in columns)] for row in columns[0]
    ]
    return _table(["", *changes], lines)


def law_table(laws: Laws, power_laws: Laws) -> str:
    """Returns what was fitted over sizes: a line for each row.

    Args:
        power_laws: with an E of zero.
    """
    lines = [
        [
            row,
            _plain_interval(law.scale),
            _plain_interval(law.exponent),
            _plain_interval(power_laws.rows[row].exponent),
        ]
        for row, law in laws.rows.items()
    ]
    return _table(["", "A", "a", "a, if E is 0"], lines)


def _plain_interval(of: Difference) -> str:
    """Returns a value that is no difference, with its interval and without a plus."""
    return interval(of).replace("+", "")


Geometry = dict[str, dict[str, float]]
"""What was measured of the checkpoints of a run: its title -> column -> value."""


def read_geometry(file: Path) -> Geometry:
    """Reads the CSV file of geometry_python.csv; empty if there is none."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        return {
            run.pop("title"): {
                column: float(text)
                for column, text in run.items()
                if text != "" and column not in ("run", "config_sha256", "steps")
            }
            for run in csv.DictReader(stream)
        }


def geometry_table(geometry: Geometry, columns: Mapping[str, tuple[str, int]]) -> str:
    """Returns columns of the measured geometry, a line for each run.

    Args:
        columns: heading -> column of the file, and the digits after the decimal point.
    """
    lines = [
        [title, *(_decimal(run.get(column), digits) for column, digits in columns.values())]
        for title, run in geometry.items()
    ]
    return _table(["", *columns], lines)


def rank_correlation(geometry: Geometry, first: str, second: str) -> float:
    """Returns Spearman's rank correlation of two columns of the measured geometry over its runs."""
    columns = [[run[column] for run in geometry.values()] for column in (first, second)]
    ranks = [rankdata(values) for values in columns]
    return float(np.corrcoef(ranks)[0, 1])


def _decimal(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _effective_rank(known: Sequence[dict[str, str]], of: Comparison, row: str) -> str:
    if values := of.values(row, "effective_rank"):
        return mean(values, digits=1)
    lines = [line for line in known if (line["comparison"], line["row"]) == (of.name, row)]
    return f"{lines[0]['mean']} ± {lines[0]['std']}" if lines else UNKNOWN


def mean_loss(of: Comparison, row: str) -> str:
    """Returns the mean of a row's test losses."""
    loss = summarize(list(of.losses(row).values())).mean
    return f"{loss:.{_DIGITS}f}" if math.isfinite(loss) else _DIVERGED


def _value(of: Comparison, row: str, key: str) -> str:
    chosen = of.chosen(row)
    if key not in chosen:
        return UNKNOWN
    return f"{chosen[key]:g}" + (" (edge)" if of.is_at_edge(row, key) else "")


def num_switches(of: Comparison, row: str) -> str:
    """Returns how often a vector is switched in a run."""
    config = of.config(row)
    if not isinstance(config.method, SwitchLoraConfig):
        return UNKNOWN
    steps = config.training.steps
    return f"{config.method.rates(steps).sum() / config.method.interval_in(steps):.1f}"


def _cell(of: Comparison, row: str, other: str, split: str, family: Sequence[str] = ()) -> str:
    if row == other:
        return UNKNOWN
    versus = of.versus(row, other, split, family)
    return _bold(interval(versus), versus.differs)


def _bold(text: str, is_bold: bool) -> str:
    return f"**{text}**" if is_bold else text


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *lines])
