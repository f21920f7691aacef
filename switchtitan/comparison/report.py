"""The report of a comparison: Markdown tables, a CSV file of its runs, and a picture."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from switchtitan.comparison.comparison import RUNS_FILE, ComparisonState
from switchtitan.comparison.config import ComparisonConfig, RowConfig
from switchtitan.comparison.plan import given_values, short_name
from switchtitan.comparison.plots import draw_curves
from switchtitan.comparison.runs import RunResult, write_csv
from switchtitan.comparison.statistics import (
    BySeed,
    Difference,
    Summary,
    adjusted,
    difference,
    summarize,
    verdict,
)
from switchtitan.comparison.tuning import Tried
from switchtitan.files import write_atomically
from switchtitan.observability.pictures import write_picture

UNKNOWN = "-"
_LEGEND = (
    "(edge): the best learning rate is the lowest or the highest one tried. Bits "
    "per byte: nats of all tokens / (ln 2 x UTF-8 bytes of their text). Effective rank: exp of the "
    "entropy of the normalized singular values of a layer's change since step 0, averaged over "
    "layers. Two factors that are both random at the start change their product by up to twice "
    "their rank. State: all that a checkpoint contains, i.e. weights, optimizer state and other "
    "tensors of the method. Peak: peak GPU memory. Tokens/s: from the runs, including occasional "
    "work such as resets, on a machine that may have done other work at the same time."
)


@dataclass(frozen=True)
class RowReport:
    """A row of the table."""

    row: RowConfig
    values: Mapping[str, float]
    """The chosen values by tuned key, and those given; empty while values are being chosen."""
    tried: tuple[Tried, ...]
    """What was tried of each key in turn; empty for a row that uses another row's values."""
    results: Sequence[RunResult]
    """Its reported runs that are finished."""
    difference: Difference | None
    """Test loss minus the baseline's, seed by seed."""
    adjusted_p: float | None
    """p-value of the difference, with Holm's correction over the rows of the table."""

    def summary(self, figure: str) -> Summary | None:
        """Returns mean and deviation of a column of `runs.csv` over the reported seeds."""
        values = [getattr(result, figure) for result in self.results]
        values = [
            math.inf if result.diverged else value
            for result, value in zip(self.results, values, strict=True)
            if result.diverged or value is not None
        ]
        return summarize(values) if values else None

    def of_first(self, figure: str) -> float | None:
        """Returns a figure that all finished runs of the row have in common."""
        finished = [result for result in self.results if not result.diverged]
        return getattr(finished[0], figure) if finished else None

    @property
    def is_at_edge(self) -> set[str]:
        """The chosen learning rates that are the lowest or the highest one tried."""
        last = {tried.key: tried for tried in self.tried}
        return {key for key, tried in last.items() if self.values and tried.is_at_edge}


def write_report(folder: Path, state: ComparisonState) -> None:
    """Writes `report.md`, `runs.csv` and `loss.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = {"selection": state.selection, "report": state.report}
    write_csv(folder / RUNS_FILE, stages, state.others)
    write_atomically(folder / "report.md", markdown(state))
    write_picture(draw_curves(state), folder / "loss.png")


def report_rows(state: ComparisonState) -> list[RowReport]:
    """Returns one report for each row of the comparison, in its order."""
    config = state.config
    losses = {row.name: losses_by_seed(state, row.name) for row in config.rows}
    baseline = losses.pop(config.baseline)
    differences = {
        row: of for row, by_seed in losses.items() if (of := difference(by_seed, baseline))
    }
    adjusted_p = adjusted({row: of.p for row, of in differences.items()})
    return [
        RowReport(
            row,
            _values(state, row),
            state.tuning.tried.get(row.name, ()),
            [result for run, result in state.report.items() if run.row == row.name],
            differences.get(row.name),
            adjusted_p.get(row.name),
        )
        for row in config.rows
    ]


def losses_by_seed(state: ComparisonState, row: str) -> BySeed:
    """Returns test losses of a row's reported runs, by seed."""
    return {run.seed: result.test_loss for run, result in state.report.items() if run.row == row}


def markdown(state: ComparisonState) -> str:
    """Returns the report as Markdown."""
    config, rows = state.config, report_rows(state)
    seeds = ", ".join(map(str, config.report_seeds))
    parts = [
        f"# {config.name}",
        f"{state.num_finished} of {state.num_runs} runs are finished.",
        *_facts(state),
        f"{_source_of_values(config)} Losses are on the test split: mean ± standard deviation "
        f"over seeds {seeds}. "
        f"Differences to {config.baseline} are taken seed by seed, with 95 % intervals "
        "(Student's t). p is adjusted by Holm's method over the rows of the table. A row differs "
        "if p is below 0.05; no difference is shown if the interval holds zero.",
        _table(rows, _columns(config)),
        _LEGEND,
    ]
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


def _values(state: ComparisonState, row: RowConfig) -> dict[str, float]:
    if state.tuning.due:
        return {}
    chosen = state.tuning.chosen.get(state.config.tuned_row(row).name, {})
    return given_values(state.config, row) | dict(chosen)


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


def _facts(state: ComparisonState) -> list[str]:
    """Returns one sentence about tokens, corpus, versions and hardware of the finished runs."""
    results = [*state.selection.values(), *state.report.values()]
    results = [result for result in results if not result.diverged]
    if not results:
        return []

    def distinct(figure: str) -> str:
        found = {str(getattr(result, figure) or "unknown") for result in results}
        return " and ".join(sorted(found))

    tokens = sorted({f"{(result.tokens or 0) / 1e6:.2f}" for result in results}, key=float)
    return [
        f"{' to '.join(dict.fromkeys((tokens[0], tokens[-1])))} M tokens per run of corpus "
        f"{distinct('corpus')} (fingerprint {distinct('corpus_fingerprint')}), "
        f"torch {distinct('torch')}, {distinct('device')}, CPU capability "
        f"{distinct('cpu_capability')}, {distinct('num_threads')} thread(s), "
        f"commit {distinct('commit')}."
    ]


def _columns(config: ComparisonConfig) -> dict[str, Callable[[RowReport], str]]:
    return {
        "": lambda row: row.row.title,
        **{short_name(key): partial(_value, key=key) for key in config.axes},
        **(
            {"M tokens": lambda row: _number(row.of_first("tokens"), 2, 1e-6)}
            if config.differ_in
            else {}
        ),
        "test loss": lambda row: _plus_minus(row.summary("test_loss"), 4),
        "test bits/byte": lambda row: _plus_minus(row.summary("test_bits_per_byte"), 4),
        "validation loss": lambda row: _plus_minus(row.summary("validation_loss"), 4),
        f"loss - {config.baseline}'s": lambda row: _difference(row.difference),
        "p": lambda row: UNKNOWN if row.adjusted_p is None else f"{row.adjusted_p:.2g}",
        "verdict": _verdict,
        "effective rank": lambda row: _plus_minus(row.summary("effective_rank"), 1),
        "trainable, M": lambda row: _number(row.of_first("num_trainable"), 3, 1e-6),
        "state, MiB": lambda row: _number(row.of_first("state_gib"), 1, 1024),
        "peak, GiB": _peak,
        "tokens/s": _speed,
    }


def _table(rows: Sequence[RowReport], columns: Mapping[str, Callable[[RowReport], str]]) -> str:
    lines = [list(columns), ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[text(row) for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _tried_line(row: RowReport, tried: Tried) -> str:
    def cell(value: float) -> str:
        loss = tried.losses[value]
        text = f"{value:g}: " + (f"{loss:.4f}" if math.isfinite(loss) else "diverged")
        return f"**{text}**" if row.values and value == tried.best else text

    edge = " (at the edge of the grid)" if row.values and tried.is_at_edge else ""
    return f"- {row.row.title}: {', '.join(cell(value) for value in sorted(tried.losses))}{edge}"


def _value(row: RowReport, key: str) -> str:
    if key not in row.values:
        return UNKNOWN
    return f"{row.values[key]:g}" + (" (edge)" if key in row.is_at_edge else "")


def _verdict(row: RowReport) -> str:
    found = None if row.difference is None else verdict(row.difference, row.adjusted_p)
    return found or UNKNOWN


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


def _peak(row: RowReport) -> str:
    """The largest peak of GPU memory. On a CPU only that of the whole process is known."""
    peaks = [result.peak_gib for result in row.results if result.device != "CPU"]
    return _number(max((peak for peak in peaks if peak is not None), default=None), 2)


def _speed(row: RowReport) -> str:
    speeds = [result.tokens_per_s for result in row.results if result.tokens_per_s is not None]
    return _number(median(speeds) if speeds else None, 0)


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return UNKNOWN if value is None else f"{value * factor:.{digits}f}"
