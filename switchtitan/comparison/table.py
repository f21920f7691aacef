"""The table of a comparison: one report per row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from switchtitan.comparison.comparison import ComparisonState
from switchtitan.comparison.config import RowConfig
from switchtitan.comparison.effective_rank import effective_rank
from switchtitan.comparison.measure import Measurements
from switchtitan.comparison.plan import given_values
from switchtitan.comparison.results import RunResult
from switchtitan.comparison.statistics import (
    BySeed,
    Difference,
    Share,
    Summary,
    adjusted,
    difference,
    share_of_gap,
    summarize,
    verdict,
)
from switchtitan.comparison.tuning import Tried
from switchtitan.training.trainer import loss_metrics


@dataclass(frozen=True)
class RowReport:
    """Results of a row's finished runs. None means not yet known."""

    name: str
    title: str
    values: dict[str, float]
    """The chosen values by tuned key, and those given; empty while values are being chosen."""
    tried: tuple[Tried, ...]
    """What was tried of each key in turn; empty for a row that uses another row's values."""
    num_diverged: int
    """Number of reported runs that diverged."""
    loss: Summary | None
    """Test loss over the reported seeds."""
    perplexity: Summary | None
    validation_loss: Summary | None
    validation_bits_per_byte: Summary | None
    """Over the reported seeds, like all that follows."""
    test_bits_per_byte: Summary | None
    difference: Difference | None
    """Test loss minus the baseline's, seed by seed."""
    adjusted_p: float | None
    """p-value of the difference, with Holm's correction over the rows of the table."""
    verdict: str | None
    """What the difference shows."""
    effective_rank: Summary | None
    """Effective rank of the linear layers' change since step 0, averaged over layers."""
    num_steps: int | None
    """Optimizer steps of a run."""
    num_tokens: int | None
    """Training tokens of a run."""
    num_trainable: int | None
    state_gib: float | None
    """Size of weights, optimizer state and candidates: all that a checkpoint contains."""
    peak_gib: float | None
    """Largest peak of GPU memory in the reported runs. None on a CPU, where only the peak of all
    the process's memory is known."""
    tokens_per_s: float | None
    """Median over the reported runs, on a machine that may have done other work."""
    measured: Measurements | None


@dataclass(frozen=True)
class GapReport:
    """The share of the difference between two rows' losses that a third row closes."""

    row: str
    start: str
    end: str
    gap: Difference | None
    """Loss of `start` minus loss of `end`, seed by seed."""
    share: Share | None
    """None if the gap's interval holds zero or the gap is not positive, if a run diverged, and
    before the row has a run."""


def report_rows(state: ComparisonState, measured: Mapping[str, Measurements]) -> list[RowReport]:
    """Returns one report for each row of the comparison, in its order."""
    losses = {row.name: losses_by_seed(state, row.name) for row in state.config.rows}
    baseline = losses.pop(state.config.baseline)
    differences = {
        row: of for row, by_seed in losses.items() if (of := difference(by_seed, baseline))
    }
    adjusted_p = adjusted({row: of.p for row, of in differences.items()})
    return [
        _report_row(
            state,
            row,
            measured.get(row.name),
            differences.get(row.name),
            adjusted_p.get(row.name),
        )
        for row in state.config.rows
    ]


def report_gaps(state: ComparisonState) -> list[GapReport]:
    """Returns one report for each row of each declared gap."""
    reports = []
    for declared in state.config.gaps:
        start, end = (losses_by_seed(state, name) for name in (declared.from_row, declared.to_row))
        gap = difference(start, end)
        is_open = gap is not None and gap.mean > 0
        for row in declared.rows:
            share = share_of_gap(losses_by_seed(state, row), start, end) if is_open else None
            reports.append(GapReport(row, declared.from_row, declared.to_row, gap, share))
    return reports


def is_at_edge(row: RowReport, key: str) -> bool:
    """Whether the chosen value of a learning rate is the lowest or the highest one tried."""
    last = [tried for tried in row.tried if tried.key == key][-1:]
    return bool(row.values) and any(tried.is_interior is False for tried in last)


def losses_by_seed(state: ComparisonState, row: str) -> BySeed:
    """Returns test losses of a row's reported runs, by seed."""
    return {result.run.seed: result.test_loss for result in state.report if result.run.row == row}


def _report_row(
    state: ComparisonState,
    row: RowConfig,
    measured: Measurements | None,
    against_baseline: Difference | None,
    adjusted_p: float | None,
) -> RowReport:
    results = [result for result in state.report if result.run.row == row.name]
    finished = [result for result in results if not result.has_diverged]
    losses = losses_by_seed(state, row.name)
    ranks = [rank for result in finished if (rank := effective_rank(result)) is not None]
    return RowReport(
        name=row.name,
        title=row.title,
        values=_values(state, row),
        tried=state.tuning.tried.get(row.name, ()),
        num_diverged=len(results) - len(finished),
        loss=summarize(list(losses.values())) if losses else None,
        perplexity=summarize(
            [
                loss_metrics("test", loss)["perplexity/test"] if math.isfinite(loss) else loss
                for loss in losses.values()
            ]
        )
        if losses
        else None,
        validation_loss=_summary_of(results, "loss/validation"),
        validation_bits_per_byte=_summary_of(results, "bits_per_byte/validation"),
        test_bits_per_byte=_summary_of(results, "bits_per_byte/test"),
        difference=against_baseline,
        adjusted_p=adjusted_p,
        verdict=None if against_baseline is None else verdict(against_baseline, adjusted_p),
        effective_rank=summarize(ranks) if ranks else None,
        num_steps=finished[0].figures["step"] if finished else None,
        num_tokens=finished[0].figures["tokens_seen"] if finished else None,
        num_trainable=finished[0].figures["num_parameters"]["trainable"] if finished else None,
        state_gib=finished[0].figures["memory/state_gib"] if finished else None,
        peak_gib=max(
            (
                peak
                for result in finished
                if result.figures["device"] != "CPU"
                and (peak := result.figures["memory/peak_gib"]) is not None
            ),
            default=None,
        ),
        tokens_per_s=_median_speed(finished),
        measured=measured,
    )


def _values(state: ComparisonState, row: RowConfig) -> dict[str, float]:
    if state.tuning.due:
        return {}
    chosen = state.tuning.chosen.get(state.config.tuned_row(row).name, {})
    return given_values(state.config, row) | dict(chosen)


def _median_speed(finished: list[RunResult]) -> float | None:
    speeds = [
        speed
        for result in finished
        if (speed := result.figures["throughput/tokens_per_s"]) is not None
    ]
    return median(speeds) if speeds else None


def _summary_of(results: list[RunResult], figure: str) -> Summary | None:
    """Returns a figure over the runs, inf of those that diverged.

    Results of earlier versions lack some figures, and are left out.
    """
    values = [math.inf if result.has_diverged else result.figures.get(figure) for result in results]
    known = [value for value in values if value is not None]
    return summarize(known) if known else None
