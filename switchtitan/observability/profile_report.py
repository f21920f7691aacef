"""Tables and pictures of the traces of all ranks, for TensorBoard and as files."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from switchtitan.files import write_atomically
from switchtitan.observability.profile_summary import ProfileSummary
from switchtitan.regions import OUTSIDE_STEP, STEP

SUMMARY_FILE = "profile_summary"
"""Name of the summary's files next to the trace, without `.md` or `.json`."""
_ORDER = ("data", "forward", "backward", "reduce", "clip", "update", "switch")
_MAX_RANKS = 16
"""Ranks with a column of their own in a table, at most."""


def write_summary(folder: Path, summaries: Sequence[ProfileSummary]) -> None:
    """Writes `profile_summary.md` and `profile_summary.json`.

    Raises:
        OSError: if they cannot be written.
    """
    text = "\n".join(f"## {title}\n\n{table}" for title, table in tables(summaries).items())
    write_atomically(folder / f"{SUMMARY_FILE}.md", f"# Profile\n\n{text}")
    contents = [
        asdict(summary)
        | {
            "regions": {name: time._asdict() for name, time in summary.regions.items()},
            "operations": [operation._asdict() for operation in summary.operations],
        }
        for summary in summaries
    ]
    write_atomically(folder / f"{SUMMARY_FILE}.json", json.dumps(contents, indent=1) + "\n")


def tables(summaries: Sequence[ProfileSummary]) -> dict[str, str]:
    """Returns tables in Markdown, by title."""
    first = summaries[0]
    titled = {"Time per region": _region_table(summaries)}
    if first.is_on_gpu:
        titled["Time per region on the GPU"] = _region_table(summaries, is_on_device=True)
    titled["Operations"] = _operation_table(first)
    return titled


def pictures(summaries: Sequence[ProfileSummary]) -> dict[str, Figure]:
    """Returns figures by name."""
    figures = {"regions": _draw_regions(summaries), "operations": _draw_operations(summaries[0])}
    if any(summary.memory_mib for summary in summaries):
        figures["memory"] = _draw_memory(summaries)
    return figures


def as_png(figure: Figure) -> tuple[bytes, int, int]:
    """Returns a figure as PNG, with its width and height in pixels."""
    figure.set_dpi(100)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    width, height = figure.canvas.get_width_height()
    return picture.getvalue(), width, height


def _names(summaries: Sequence[ProfileSummary]) -> list[str]:
    """Returns all regions of a step in order, its other time last."""
    found = {name for summary in summaries for name in summary.regions}
    known = [name for name in _ORDER if name in found]
    added = sorted(found - {*_ORDER, STEP, *OUTSIDE_STEP})
    return [*known, *added, STEP]


def _label(name: str) -> str:
    return "other" if name == STEP else name


def _region_table(summaries: Sequence[ProfileSummary], is_on_device: bool = False) -> str:
    shown = summaries[:_MAX_RANKS]
    lines = [
        f"Milliseconds per step, mean of {shown[0].num_steps} steps; "
        "each region without those inside it. "
        "Evaluations, saves and reports: per call.",
        "",
        "| region | calls | "
        + " | ".join(f"rank {summary.rank}" for summary in shown)
        + " | share |",
        "|---|---:|" + "---:|" * (len(shown) + 1),
    ]
    in_step = _names(shown)
    for name in (*in_step, *OUTSIDE_STEP):
        times = [summary.regions.get(name) for summary in shown]
        if not any(times):
            continue
        cells = [
            "" if time is None else f"{time.device_ms if is_on_device else time.host_ms:.3f}"
            for time in times
        ]
        num_calls = max(0 if time is None else time.num_calls for time in times)
        share = f"{shown[0].share(name):.1%}" if name in in_step else ""
        lines.append(f"| {_label(name)} | {num_calls} | {' | '.join(cells)} | {share} |")
        if name == STEP and not is_on_device:
            steps = " | ".join(f"{summary.step_ms:.3f}" for summary in shown)
            lines.append(f"| step | {shown[0].num_steps} | {steps} | |")
    lines += ["", f"Shares are those of rank {shown[0].rank}."]
    if "switch" in shown[0].regions:
        lines += ["", f"The switch takes {shown[0].share('switch'):.1%} of the step."]
    return "\n".join(lines) + "\n"


def _operation_table(summary: ProfileSummary) -> str:
    kind = "Kernels" if summary.is_on_gpu else "Operations"
    lines = [
        f"{kind} of rank {summary.rank} with the most self time, in {summary.num_steps} steps.",
        "",
        "| operation | calls | self time (ms) | share |",
        "|---|---:|---:|---:|",
    ]
    for operation in summary.operations:
        name = operation.name.replace("|", r"\|")
        name = name if len(name) <= 80 else f"{name[:77]}..."
        lines.append(
            f"| `{name}` | {operation.num_calls} | {operation.self_ms:.3f} "
            f"| {operation.share:.1%} |"
        )
    return "\n".join(lines) + "\n"


def _draw_regions(summaries: Sequence[ProfileSummary]) -> Figure:
    shown = summaries[:_MAX_RANKS]
    figure = Figure(figsize=(9, 1.8 + 0.45 * len(shown)), layout="constrained")
    axes = figure.subplots()
    names = _names(shown)
    left = [0.0] * len(shown)
    labels = [f"rank {summary.rank}" for summary in shown]
    is_on_gpu = shown[0].is_on_gpu
    for index, name in enumerate(names):
        widths = [
            0.0
            if (time := summary.regions.get(name)) is None
            else (time.device_ms if is_on_gpu else time.host_ms)
            for summary in shown
        ]
        colour = "0.8" if name == STEP else f"C{index % 10}"
        axes.barh(labels, widths, left=left, color=colour, label=_label(name))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Time of a step by region", xlabel="ms on the GPU" if is_on_gpu else "ms")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize="small")
    return figure


def _draw_operations(summary: ProfileSummary) -> Figure:
    shown = summary.operations[:12]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    names = [
        operation.name if len(operation.name) <= 48 else f"{operation.name[:45]}..."
        for operation in shown
    ]
    axes.barh(names, [100 * operation.share for operation in shown])
    axes.invert_yaxis()
    axes.set(
        title=f"Operations with the most self time, rank {summary.rank}",
        xlabel="% of the self time of all operations",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_memory(summaries: Sequence[ProfileSummary]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for summary in summaries[:_MAX_RANKS]:
        if summary.memory_mib:
            axes.plot(*zip(*summary.memory_mib, strict=True), label=f"rank {summary.rank}")
    axes.set(title="Allocated memory", xlabel="ms since the first allocation", ylabel="MiB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
