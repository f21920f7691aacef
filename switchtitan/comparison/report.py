"""The report of a comparison as Markdown, JSON and CSV."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from switchtitan.comparison.comparison import ComparisonState
from switchtitan.comparison.config import ComparisonConfig
from switchtitan.comparison.plan import short_name
from switchtitan.comparison.results import RunResult
from switchtitan.comparison.runs_csv import run_record, runs_csv
from switchtitan.comparison.statistics import Difference, Summary
from switchtitan.comparison.table import GapReport, RowReport, is_at_edge
from switchtitan.comparison.tuning import Tried
from switchtitan.config.toml_text import resolved_toml
from switchtitan.files import write_atomically
from switchtitan.json_values import finite_or_none

UNKNOWN = "-"
_LEGEND = (
    "(edge): the best learning rate is the lowest or the highest one tried. Bits per byte: nats of "
    "all tokens / (ln 2 x UTF-8 bytes of their text). Effective rank: exp of "
    "the entropy of the normalized singular values of a layer's change since step 0, averaged over "
    "layers. Two factors that are both random at the start change their product by up to twice "
    "their rank. State: all that a checkpoint contains, i.e. weights, optimizer state and other "
    "tensors of the method. Peak: peak GPU memory. Tokens/s: from the runs, including occasional "
    "work such as resets, on a machine that may have done other work at the same time. Step times "
    "are measured side by side early in a run. Bytes are those of the second step, in as few "
    "micro-batches as fit. Step times and bytes do not include work that is done only every few "
    "hundred steps."
)


def write_report(
    folder: Path, state: ComparisonState, rows: Sequence[RowReport], gaps: Sequence[GapReport]
) -> None:
    """Writes `report.md`, `results.json` and `runs.csv` to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    records = _records(state)
    write_atomically(folder / "report.md", markdown(state, rows, gaps))
    write_atomically(folder / "results.json", json_text(state, rows, gaps, records))
    write_atomically(folder / "runs.csv", runs_csv(records, state.config.axes))


def markdown(state: ComparisonState, rows: Sequence[RowReport], gaps: Sequence[GapReport]) -> str:
    """Returns the report as Markdown."""
    config, done = state.config, len(state.selection) + len(state.report)
    parts = [f"# {config.name}", f"{done} of {state.num_runs} runs are finished."]
    parts += [text for text in (_facts(state), _without_folders(state)) if text]
    seeds = ", ".join(map(str, config.report_seeds))
    parts.append(
        f"{_source_of_values(config)} Losses are on the test split: mean ± standard deviation "
        f"over seeds {seeds}. "
        f"Differences to {config.baseline} are taken seed by seed, with 95 % intervals "
        "(Student's t). p is adjusted by Holm's method over the rows of the table. A row differs "
        "if p is below 0.05; no difference is shown if the interval holds zero."
    )
    parts.append(_table(rows, _columns(config)))
    parts.append(_LEGEND)
    if gaps:
        titles = {row.name: row.title for row in config.rows}
        diverged = {row.name for row in rows if row.num_diverged}
        parts.append("Shares of differences in test loss, with 95 % intervals (Fieller's):")
        parts.append(
            "\n".join(
                f"- {titles[gap.row]}, from {titles[gap.start]} to {titles[gap.end]}: "
                f"{_share(gap, gap.row in diverged)}"
                for gap in gaps
            )
        )
    if any(row.values for row in config.rows):
        parts.append(
            "## Choice of values\n\nValidation loss by value, with the other keys as chosen "
            "before. The chosen value is bold."
        )
    for place, key in enumerate(config.axes):
        lines = [
            _tried_line(row, tried) for row in rows for tried in row.tried if tried.place == place
        ]
        if lines:
            parts += [f"{short_name(key)}:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def json_text(
    state: ComparisonState,
    rows: Sequence[RowReport],
    gaps: Sequence[GapReport],
    records: Sequence[Mapping[str, object]],
) -> str:
    """Returns all results as JSON; a number that is not finite becomes null.

    Args:
        records: the columns of each finished run.
    """
    folders = [
        str(result.run.folder) if result.has_folder else None for _, result in _staged(state)
    ]
    contents = {
        "comparison": resolved_toml(state.config),
        "num_runs_finished": len(state.selection) + len(state.report),
        "num_runs": state.num_runs,
        "rows": [asdict(row) | {"tried": list(map(_tried_record, row.tried))} for row in rows],
        "gaps": [asdict(gap) for gap in gaps],
        "runs": [
            dict(record) | {"folder": folder}
            for record, folder in zip(records, folders, strict=True)
        ],
    }
    return json.dumps(finite_or_none(contents), indent=2) + "\n"


def _records(state: ComparisonState) -> list[dict[str, object]]:
    return [run_record(stage, result, state.config.axes) for stage, result in _staged(state)]


def _staged(state: ComparisonState) -> list[tuple[str, RunResult]]:
    return [("selection", result) for result in state.selection] + [
        ("report", result) for result in state.report
    ]


def _source_of_values(config: ComparisonConfig) -> str:
    """Returns one sentence about where the values of the tuned keys come from."""
    keys = ", ".join(map(short_name, config.axes))
    giving = [row.title for row in config.rows if not config.tuned_row(row).values]
    if len(giving) == len(config.rows):
        return f"{keys} of each row: given."
    given = f" Given for {', '.join(giving)}." if giving else ""
    return (
        f"{keys} of each row: chosen by the validation loss after the last step, with seed "
        f"{config.selection_seed}.{given}"
    )


def _facts(state: ComparisonState) -> str:
    """Returns one sentence about tokens, corpus, versions and hardware of the finished runs."""
    figures = [result.figures for _, result in _staged(state) if not result.has_diverged]
    if not figures:
        return ""

    def distinct(find: Callable[[dict], object]) -> str:
        return " and ".join(sorted({str(find(of_run) or "unknown") for of_run in figures}))

    tokens = sorted({round(of_run["tokens_seen"] / 1e6, 2) for of_run in figures})
    return (
        f"{' to '.join(f'{value:.2f}' for value in dict.fromkeys((tokens[0], tokens[-1])))} "
        "M tokens per run of corpus "
        f"{distinct(lambda f: f['corpus']['name'])} "
        f"(fingerprint {distinct(lambda f: f['corpus']['fingerprint'])}), "
        f"torch {distinct(lambda f: f['versions']['torch'])}, {distinct(lambda f: f['device'])}, "
        f"CPU capability {distinct(lambda f: f.get('cpu_capability'))}, "
        f"{distinct(lambda f: f['num_threads'])} thread(s), "
        f"commit {distinct(lambda f: f.get('commit'))}."
    )


def _without_folders(state: ComparisonState) -> str:
    number = sum(not result.has_folder for _, result in _staged(state))
    if not number:
        return ""
    return (
        f"{number} of these runs are from {', '.join(map(str, state.config.finished_runs))}: their "
        "folders are not on this machine, and their curves are missing."
    )


def _columns(config: ComparisonConfig) -> dict[str, Callable[[RowReport], str]]:
    baseline = config.baseline
    return {
        "": lambda row: row.title,
        **{short_name(key): partial(_value, key=key) for key in config.axes},
        **({"M tokens": lambda row: _number(row.num_tokens, 2, 1e-6)} if config.differ_in else {}),
        "test loss": lambda row: _plus_minus(row.loss, 4),
        "perplexity": lambda row: _plus_minus(row.perplexity, 3),
        "test bits/byte": lambda row: _plus_minus(row.test_bits_per_byte, 4),
        "validation loss": lambda row: _plus_minus(row.validation_loss, 4),
        "validation bits/byte": lambda row: _plus_minus(row.validation_bits_per_byte, 4),
        f"loss - {baseline}'s": lambda row: _difference(row.difference),
        "p": lambda row: UNKNOWN if row.adjusted_p is None else f"{row.adjusted_p:.2g}",
        "verdict": lambda row: row.verdict or UNKNOWN,
        "effective rank": lambda row: _plus_minus(row.effective_rank, 1),
        "trainable, M": lambda row: _number(row.num_trainable, 3, 1e-6),
        "state, MiB": lambda row: _number(row.state_gib, 1, 1024),
        "peak, GiB": lambda row: _number(row.peak_gib, 2),
        "tokens/s": lambda row: _number(row.tokens_per_s, 0),
        f"step / {baseline}'s": lambda row: _ratio(row),
        f"MiB sent per step, {config.communication_ranks} ranks": _mib_sent,
    }


def _table(rows: Sequence[RowReport], columns: Mapping[str, Callable[[RowReport], str]]) -> str:
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[text(row) for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tried_line(row: RowReport, tried: Tried) -> str:
    is_known = bool(row.values)

    def cell(value: float) -> str:
        loss = tried.losses[value]
        text = f"{value:g}: " + (f"{loss:.4f}" if math.isfinite(loss) else "diverged")
        return f"**{text}**" if is_known and value == tried.best else text

    edge = " (at the edge of the grid)" if is_known and tried.is_interior is False else ""
    return f"- {row.title}: {', '.join(cell(value) for value in sorted(tried.losses))}{edge}"


def _value(row: RowReport, key: str) -> str:
    if key not in row.values:
        return UNKNOWN
    return f"{row.values[key]:g}" + (" (edge)" if is_at_edge(row, key) else "")


def _plus_minus(summary: Summary | None, digits: int) -> str:
    if summary is None:
        return UNKNOWN
    if not math.isfinite(summary.mean):
        return "diverged"
    deviation = f" ± {summary.std:.{digits}f}" if summary.std is not None else ""
    runs = f" ({summary.num} run)" if summary.num == 1 else ""
    return f"{summary.mean:.{digits}f}{deviation}{runs}"


def _difference(of: Difference | None) -> str:
    if of is None or not math.isfinite(of.mean):
        return UNKNOWN
    if of.low is None:
        return f"{of.mean:+.4f} (one seed)"
    return f"{of.mean:+.4f} ({of.low:+.4f} to {of.high:+.4f})"


def _share(of: GapReport, has_diverged: bool) -> str:
    """Returns the share in words.

    Args:
        has_diverged: whether a reported run of the row did.
    """
    if of.gap is None:
        return "not yet known."
    if has_diverged or not math.isfinite(of.gap.mean):
        return "a run diverged; share not reported."
    width = f"the difference of {_difference(of.gap)}"
    if of.gap.low is not None and of.gap.holds_zero:
        return f"the interval of {width} holds zero; share not reported."
    if of.gap.mean <= 0:
        return f"{width} is not positive; share not reported."
    if of.share is None:
        return "not yet known."
    if of.share.low is None or of.share.high is None:
        return f"closes {100 * of.share.mean:.0f} % of {width}."
    interval = f"{100 * of.share.low:.0f} to {100 * of.share.high:.0f} %"
    return f"closes {100 * of.share.mean:.0f} % ({interval}) of {width}."


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return UNKNOWN if value is None else f"{value * factor:.{digits}f}"


def _mib_sent(row: RowReport) -> str:
    return _number(None if row.measured is None else row.measured.bytes_per_step, 2, 2**-20)


def _ratio(row: RowReport) -> str:
    measured = row.measured
    if measured is None:
        return UNKNOWN
    low, high = measured.step_ratio_low, measured.step_ratio_high
    return f"{measured.step_ratio:.2f} ({low:.2f} to {high:.2f})"


def _tried_record(tried: Tried) -> dict[str, object]:
    losses = {f"{value:g}": loss for value, loss in tried.losses.items()}
    return {
        "key": tried.key,
        "place": tried.place,
        "is_interior": tried.is_interior,
        "losses": losses,
    }
