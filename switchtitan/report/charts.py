"""The charts of a report: which metrics, in which order, and how each is drawn."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from switchtitan.report.points import Line, Points, shorten

Lines = Mapping[str, Line]
"""A run's curves by metric."""


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    unit: str = ""
    is_smoothed: bool = False
    """Whether the smoothing slider changes its lines."""
    is_log: bool = False
    is_percent: bool = False


MAIN = {
    "loss/train": Metric("Training loss", "nats per token", is_smoothed=True),
    "loss/validation": Metric("Validation loss", "nats per token"),
    "perplexity/validation": Metric("Perplexity", "validation", is_log=True),
    "optimizer/lr": Metric("Learning rate"),
    "optimizer/grad_norm": Metric("Gradient norm", "before clipping", is_smoothed=True),
    "throughput/tokens_per_s": Metric("Speed", "tokens/s", is_smoothed=True),
    "memory/peak_gib": Metric("Peak memory", "GiB"),
}
"""Shown first."""
SWITCHES = {
    "switch/candidate_coverage": Metric("Candidates used so far", "share", is_percent=True),
    "switch/vectors_switched_total": Metric("Vectors switched so far"),
    "switch/vectors_switched": Metric("Vectors switched", "in the reported step", is_smoothed=True),
    "switch/frozen_share": Metric("Frozen vectors", "share", is_smoothed=True, is_percent=True),
}
"""Shown in a section of their own."""
_TIMES = "time/"
"""Prefix of the times of regions."""
_WITHOUT_CHART = ("throughput/eta_s", "data/tokens_seen")
_MANY_POINTS = 200
"""Other metrics with more points than this are smoothed."""


def metrics_of(curves: Iterable[Lines]) -> dict[str, dict[str, Metric]]:
    """Returns the metrics that any of the runs has, by section."""
    found: dict[str, int] = {}
    for of_run in curves:
        for name, line in of_run.items():
            found[name] = max(found.get(name, 0), len(line.x))
    shown = {name for name in found if name not in _WITHOUT_CHART}
    times = sorted(name for name in shown if name.startswith(_TIMES))
    others = sorted(shown - MAIN.keys() - SWITCHES.keys() - {*times})
    return {
        "main": {name: metric for name, metric in MAIN.items() if name in shown},
        "switches": {name: metric for name, metric in SWITCHES.items() if name in shown},
        "times": {
            name: Metric(name.removeprefix(_TIMES).removesuffix("_ms"), "ms", is_smoothed=True)
            for name in times
        },
        "others": {name: Metric(name, is_smoothed=found[name] > _MANY_POINTS) for name in others},
    }


def draw_metrics(
    metrics: Mapping[str, Metric], runs: Mapping[int, Lines], points_of_each: int
) -> list[dict[str, object]]:
    """Returns one chart per metric, with the curves of all runs that have it.

    Args:
        runs: curves by metric, by the run's place in the report.
        points_of_each: points of a curve, at most.
    """
    return [
        chart(
            name,
            metric,
            {
                place: shorten(curves[name], points_of_each)
                for place, curves in runs.items()
                if name in curves
            },
        )
        for name, metric in metrics.items()
    ]


def chart(
    name: str,
    metric: Metric,
    curves: Mapping[int, Points],
    *,
    across: str = "step",
    is_log_across: bool = False,
    is_scatter: bool = False,
    floor: float | None = None,
) -> dict[str, object]:
    """Returns a chart for the page's code.

    Args:
        curves: by the run's place in the report.
        across: the quantity of the horizontal axis. Charts over "step" are zoomed together.
        is_scatter: whether the points stand for themselves, few and unevenly spaced.
        floor: the lowest value in view before any zoom.
    """
    return {
        "metric": name,
        "title": metric.title,
        "unit": metric.unit,
        "across": across,
        "isLog": metric.is_log,
        "isLogAcross": is_log_across,
        "isPercent": metric.is_percent,
        "isSmoothed": metric.is_smoothed,
        "isScatter": is_scatter,
        "floor": floor,
        "curves": {str(place): points for place, points in curves.items()},
    }


def num_curves_of(metrics: Iterable[str], runs: Iterable[Lines]) -> int:
    """Returns the number of curves in the charts of these metrics."""
    names = set(metrics)
    return sum(len(names & lines.keys()) for lines in runs)
