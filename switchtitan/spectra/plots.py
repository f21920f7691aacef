"""Draw and tabulate spectra of runs side by side."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchtitan.spectra.runs import Band, GroupSpectra
from switchtitan.spectra.spectrum import NUMERICAL_RANK_THRESHOLD

SPECTRUM_FLOOR = 1e-5
"""Lower limit of the axis, as a share of the largest singular value; below is fp32 noise."""


def draw(groups: Mapping[str, GroupSpectra]) -> Figure:
    """Draws mean spectrum, effective rank by kind of layer and, if measured, over training."""
    panels = ["spectrum", "kinds"] + (
        ["course"] if any(group.course_steps for group in groups.values()) else []
    )
    widths = {"spectrum": 1.0, "kinds": 1.25, "course": 1.0}
    figure = Figure(figsize=(4.4 * sum(widths[name] for name in panels), 4.4), layout="constrained")
    axes = figure.subplot_mosaic([list(panels)], width_ratios=[widths[name] for name in panels])
    _draw_spectra(axes["spectrum"], groups)
    _draw_kinds(axes["kinds"], groups)
    if "course" in axes:
        _draw_course(axes["course"], groups)
    for name, panel in axes.items():
        panel.grid(alpha=0.3, axis="y" if name == "kinds" else "both")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    lines, labels = axes["spectrum"].get_legend_handles_labels()
    figure.legend(
        lines, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False
    )
    return figure


def table(groups: Mapping[str, GroupSpectra]) -> str:
    """Returns a table with mean ranks over layers and runs, and the full rank, for each label."""
    rows = [("", "runs", "step", "effective rank", f"above {NUMERICAL_RANK_THRESHOLD:.0%}", "of")]
    for label, group in groups.items():
        steps = sorted({run.step for run in group.runs})
        rows.append(
            (
                label,
                str(len(group.runs)),
                str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
                _format(group.effective_rank),
                _format(group.numerical_rank),
                str(len(group.spectrum.mean)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    )


def _draw_spectra(axes: Axes, groups: Mapping[str, GroupSpectra]) -> None:
    for index, (label, group) in enumerate(groups.items()):
        positions = range(1, len(group.spectrum.mean) + 1)
        axes.plot(positions, group.spectrum.mean, color=f"C{index}", label=label)
        _draw_band(axes, positions, group.spectrum, f"C{index}")
    axes.axhline(NUMERICAL_RANK_THRESHOLD, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"{NUMERICAL_RANK_THRESHOLD:.0%}",
        (1, NUMERICAL_RANK_THRESHOLD),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 2),
        textcoords="offset points",
        ha="right",
        color="grey",
    )
    axes.set(
        title="Singular values of the change",
        xlabel="index",
        ylabel="share of the largest (mean over layers)",
        yscale="log",
        ylim=(SPECTRUM_FLOOR, 1.5),
        xlim=(0, None),
    )


def _draw_kinds(axes: Axes, groups: Mapping[str, GroupSpectra]) -> None:
    kinds = list(next(iter(groups.values())).effective_rank_by_kind)
    width = 0.8 / len(groups)
    for index, group in enumerate(groups.values()):
        bands = [group.effective_rank_by_kind[kind] for kind in kinds]
        centres = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(kinds))]
        heights = [band.mean[0] for band in bands]
        axes.bar(centres, heights, 0.92 * width, color=f"C{index}")
        if len(group.runs) > 1:
            axes.vlines(
                centres,
                [band.low[0] for band in bands],
                [band.high[0] for band in bands],
                color="black",
                linewidth=1,
            )
    axes.set(
        title="Effective rank of the change",
        ylabel=f"mean over blocks, of {_full_rank(groups)}",
        ylim=(0, None),
    )
    axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds])


def _draw_course(axes: Axes, groups: Mapping[str, GroupSpectra]) -> None:
    for index, group in enumerate(groups.values()):
        if group.course_steps:
            axes.plot(group.course_steps, group.course.mean, ".-", color=f"C{index}")
            _draw_band(axes, group.course_steps, group.course, f"C{index}")
    axes.set(
        title="Effective rank over training",
        xlabel="step",
        ylabel=f"mean over layers, of {_full_rank(groups)}",
        xlim=(0, None),
        ylim=(0, None),
    )


def _draw_band(axes: Axes, positions: Sequence[int], band: Band, colour: str) -> None:
    """Draws the range over the runs."""
    axes.fill_between(positions, band.low, band.high, color=colour, alpha=0.2, linewidth=0)


def _full_rank(groups: Mapping[str, GroupSpectra]) -> int:
    """Returns the full rank of the largest layer drawn."""
    return max(len(group.spectrum.mean) for group in groups.values())


def _format(band: Band) -> str:
    (mean,), (low,), (high,) = band
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f}-{high:.1f})"
