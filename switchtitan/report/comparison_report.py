"""The contents of a report of a comparison, for its page's code."""

import json
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from switchtitan.comparison.plan import short_name
from switchtitan.comparison.statistics import interval_of_mean
from switchtitan.observability.console import format_count
from switchtitan.report.charts import Lines
from switchtitan.report.chosen_values import chosen_cell, selection_section
from switchtitan.report.comparison_files import (
    ComparisonRecord,
    Difference,
    Row,
    Sample,
    Share,
)
from switchtitan.report.points import Line, plain
from switchtitan.report.run_files import RunRecord
from switchtitan.report.run_report import Contents, curve_sections
from switchtitan.report.run_summary import tokens_per_step
from switchtitan.report.tables import (
    Cell,
    Column,
    cell,
    mark_lowest,
    number_cell,
    table,
    text_cell,
    without_unknown,
)

_MARKS = (
    "Bar: standard deviation over seeds. Line: 95 % interval of the mean (Student's t). "
    "Circles: seeds."
)


def comparison_report(record: ComparisonRecord) -> Contents:
    """Returns the contents of a report of a comparison; its rows take the place of runs."""
    results = record.results
    curves = {
        place: mean_lines(list(record.runs[row.name].values()))
        for place, row in enumerate(results.rows)
        if row.name in record.runs
    }
    name, baseline = (
        _declared(results.comparison, "name"),
        _declared(results.comparison, "baseline"),
    )
    done = f"{results.num_runs_finished} of {results.num_runs} runs finished"
    return {
        "title": name or record.folder.name,
        "subtitle": f"{record.folder} · {done}",
        "notes": list(record.notes),
        "series": [
            {
                "name": row.title,
                "folder": row.name,
                "tokensPerStep": next(
                    (tokens_per_step(run) for run in record.runs.get(row.name, {}).values()), None
                ),
            }
            for row in results.rows
        ],
        "sections": [
            section
            for section in (
                _result_section(record, baseline),
                *curve_sections(
                    curves, "Curves by row", "Mean ± standard deviation over the reported seeds."
                ),
                selection_section(results.rows),
                _declaration_section(results.comparison),
            )
            if section is not None
        ],
    }


def mean_lines(runs: Sequence[RunRecord]) -> Lines:
    """Returns mean and standard deviation of each metric over runs, at the steps of all of them."""
    lines = {}
    for name in runs[0].curves:
        if any(name not in run.curves for run in runs):
            continue
        of_runs = [dict(zip(*run.curves[name], strict=True)) for run in runs]
        steps = sorted(set.intersection(*(set(of) for of in of_runs)))
        if not steps:
            continue
        values = np.array([[of[step] for step in steps] for of in of_runs])
        with np.errstate(invalid="ignore", over="ignore"):
            deviation = values.std(axis=0, ddof=1).tolist() if len(runs) > 1 else None
            lines[name] = Line(steps, values.mean(axis=0).tolist(), deviation)
    return lines


def _result_section(record: ComparisonRecord, baseline: str | None) -> Contents:
    losses = _losses_by_seed(record)
    of_baseline = losses.get(baseline or "", {})
    differences = {
        name: {
            seed: loss - of_baseline[seed] for seed, loss in of_row.items() if seed in of_baseline
        }
        for name, of_row in losses.items()
        if name != baseline
    }
    rows = record.results.rows
    titles = {row.name: row.title for row in rows}
    intervals = [
        _intervals(
            "Test loss",
            rows,
            {row.name: (row.loss, _sample(row.loss, 4)) for row in rows},
            losses,
            has_zero=False,
        ),
        _intervals(
            f"Test loss minus that of {titles.get(baseline or '', 'the baseline')}, seed by seed",
            rows,
            {row.name: (row.difference, _difference(row.difference)) for row in rows},
            differences,
            has_zero=True,
        ),
    ]
    return {
        "id": "results",
        "title": "Results",
        "note": "Losses are on the test split: mean ± standard deviation over the reported seeds. "
        "Differences: 95 % intervals of the mean over seeds (paired, Student's t); p is adjusted "
        "by Holm's method over the rows.",
        "tables": [_table(rows, titles.get(baseline or "", "the baseline"))],
        "intervals": [of for of in intervals if of["rows"]],
        "folded": [_gaps(record)] if record.results.gaps else [],
    }


def _table(rows: Sequence[Row], baseline: str) -> Contents:
    keys = dict.fromkeys(key for row in rows for key in row.values)
    columns = {
        **{
            Column(short_name(key), "chosen, or given"): [chosen_cell(row, key) for row in rows]
            for key in keys
        },
        **_tokens_column(rows),
        Column("test loss"): [_sample(row.loss, 4) for row in rows],
        Column("95 % interval", "of the mean test loss"): [_interval(row.loss) for row in rows],
        Column("perplexity"): [_sample(row.perplexity, 3) for row in rows],
        Column("test bits/byte"): [_sample(row.test_bits_per_byte, 4) for row in rows],
        Column("val. loss"): [_sample(row.validation_loss, 4) for row in rows],
        Column("val. bits/byte"): [_sample(row.validation_bits_per_byte, 4) for row in rows],
        Column(f"minus {baseline}", "seed by seed, with the 95 % interval"): [
            _difference(row.difference) for row in rows
        ],
        Column("p", "adjusted by Holm's method over the rows"): [
            number_cell(row.adjusted_p, ".2g") for row in rows
        ],
        Column("verdict", "differs: p is below 0.05", is_text=True): [
            text_cell(row.verdict) for row in rows
        ],
        Column("effective rank", "of the weights' change"): [
            _sample(row.effective_rank, 1) for row in rows
        ],
        Column("trainable"): [
            cell(None)
            if row.num_trainable is None
            else cell(format_count(row.num_trainable), row.num_trainable)
            for row in rows
        ],
        Column("state, MiB", "weights, optimizer state and other tensors of the method"): [
            number_cell(row.state_gib, ".1f", 1024) for row in rows
        ],
        Column("peak, GiB", "peak GPU memory"): [number_cell(row.peak_gib, ".2f") for row in rows],
        Column("tokens/s"): [number_cell(row.tokens_per_s, ".0f") for row in rows],
        Column(f"step / {baseline}", "median, with its 95 % interval"): [
            cell(None)
            if (of := row.measured) is None
            else cell(
                f"{of.step_ratio:.2f} ({of.step_ratio_low:.2f} to {of.step_ratio_high:.2f})",
                of.step_ratio,
            )
            for row in rows
        ],
        Column("MiB sent", "by each rank in a step"): [
            number_cell(row.measured.bytes_per_step if row.measured else None, ".2f", 2**-20)
            for row in rows
        ],
    }
    mark_lowest(columns[Column("test loss")])
    known = without_unknown(columns)
    return table("Results", known, list(range(len(rows))), rows_title="row")


def _tokens_column(rows: Sequence[Row]) -> dict[Column, list[Cell]]:
    """Returns the tokens of the rows' runs if they differ."""
    if len({row.num_tokens for row in rows if row.num_tokens is not None}) < 2:
        return {}
    column = Column("M tokens", "training tokens of a run")
    return {column: [number_cell(row.num_tokens, ".2f", 1e-6) for row in rows]}


def _intervals(
    title: str,
    rows: Sequence[Row],
    samples: Mapping[str, tuple[Sample | None, Cell]],
    by_seed: Mapping[str, Mapping[int, float]],
    *,
    has_zero: bool,
) -> Contents:
    """Returns what a picture of intervals shows, with the text of each sample's cell."""
    shown = []
    for place, row in enumerate(rows):
        sample, shown_cell = samples[row.name]
        if sample is None or sample.mean is None:
            continue
        low, high = interval_of_mean(sample.mean, sample.std, sample.num) or (None, None)
        shown.append(
            {
                "series": place,
                "text": shown_cell["text"],
                "mean": sample.mean,
                "deviation": sample.std,
                "low": low,
                "high": high,
                "points": plain(list(by_seed.get(row.name, {}).values())),
            }
        )
    return {"title": title, "note": _MARKS, "zero": has_zero, "rows": shown}


def _losses_by_seed(record: ComparisonRecord) -> dict[str, dict[int, float]]:
    losses: dict[str, dict[int, float]] = {}
    for run in record.results.runs:
        if run.stage == "report" and run.test_loss is not None:
            losses.setdefault(run.row, {})[run.seed] = run.test_loss
    return losses


def _gaps(record: ComparisonRecord) -> Contents:
    titles = {row.name: row.title for row in record.results.rows}
    places = {row.name: place for place, row in enumerate(record.results.rows)}
    gaps = record.results.gaps
    return table(
        "Shares of differences in test loss",
        {
            Column("from", is_text=True): [cell(titles.get(of.start, of.start)) for of in gaps],
            Column("to", is_text=True): [cell(titles.get(of.end, of.end)) for of in gaps],
            Column("difference"): [_difference(of.gap) for of in gaps],
            Column(
                "share closed",
                "with its 95 % interval (Fieller's); unknown if the interval of the difference "
                "holds zero, or a run diverged",
            ): [_share(of.share) for of in gaps],
        },
        [places.get(of.row) for of in gaps],
        [titles.get(of.row, of.row) for of in gaps],
        rows_title="row",
    )


def _declaration_section(declaration: str) -> Contents:
    lines = [line for line in declaration.splitlines() if line.strip()]
    return {
        "id": "declaration",
        "title": "Declaration of the comparison",
        "isFolded": True,
        "text": "\n".join(lines),
    }


def _declared(declaration: str, key: str) -> str | None:
    """Returns a string of the declaration. Earlier versions wrote rows that TOML cannot parse."""
    line = re.search(rf'^{key} = (".*")$', declaration, re.MULTILINE)
    try:
        return None if line is None else str(json.loads(line.group(1)))
    except ValueError:
        return None


def _sample(sample: Sample | None, digits: int) -> Cell:
    if sample is None:
        return cell(None)
    if sample.mean is None:
        return cell("diverged", math.inf)
    deviation = "" if sample.std is None else f" ± {sample.std:.{digits}f}"
    return cell(f"{sample.mean:.{digits}f}{deviation}", sample.mean, f"{sample.num} seed(s)")


def _share(share: Share | None) -> Cell:
    if share is None:
        return cell(None)
    interval = (
        ""
        if share.low is None or share.high is None
        else f" ({100 * share.low:.0f} to {100 * share.high:.0f} %)"
    )
    return cell(f"{100 * share.mean:.0f} %{interval}", share.mean, f"{share.num} seed(s)")


def _interval(sample: Sample | None) -> Cell:
    if sample is None or sample.mean is None:
        return cell(None)
    interval = interval_of_mean(sample.mean, sample.std, sample.num)
    if interval is None:
        return cell(None)
    return cell(f"{interval[0]:.4f} to {interval[1]:.4f}", interval[1] - interval[0])


def _difference(of: Difference | None) -> Cell:
    if of is None or of.mean is None:
        return cell(None)
    known = of.low is not None and of.high is not None
    interval = f"({of.low:+.4f} to {of.high:+.4f})" if known else "(one seed)"
    return cell(f"{of.mean:+.4f} {interval}", of.mean, f"{of.num} seed(s)")
