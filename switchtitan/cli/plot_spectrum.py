"""Draws, for runs side by side, the rank of what training has added to each linear layer's weight.

    switchtitan plot spectrum outputs/RUN [outputs/RUN ...] --output spectra.png
    switchtitan plot spectrum --label lora=outputs/A,outputs/B --label full=outputs/C --output spectra.png

It compares each run's newest checkpoint with the weights that the run started from, which follow from its
seed, or were read by its warm start; the run needs no telemetry. Where runs did measure on the way
([spectrum] interval), the course over training is drawn too.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from switchtitan.errors import ConfigError, UserError, exit_for
from switchtitan.observability.pictures import write_picture
from switchtitan.spectra.runs import (
    Band,
    GroupSpectra,
    as_json,
    average,
    check_same_model,
    read_run_spectra,
)
from switchtitan.spectra.spectrum import NUMERICAL_RANK_THRESHOLD

SPECTRUM_FLOOR = 1e-5
"""Smaller shares of the largest singular value are not drawn: near the roundings of fp32 weights."""


def main(argv: Sequence[str]) -> None:
    """Draws what the command line asks for and prints a table."""
    options = read_options(argv)
    try:
        labels = labelled(options.runs, options.label)
        spectra = {
            label: [read_run_spectra(run, options.layers) for run in runs] for label, runs in labels.items()
        }
        check_same_model([run for runs in spectra.values() for run in runs])
        groups = {label: average(runs) for label, runs in spectra.items()}
        write_picture(draw(groups), options.output)
        if options.json is not None:
            write_json(groups, options.json)
    except UserError as error:
        exit_for(error)
    print(table(groups))
    print(options.output)


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse ends the program with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="switchtitan plot spectrum",
        description="Draws the rank of the weights' change since step 0, for runs side by side.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="a run's output folder, or one of its checkpoints"
    )
    parser.add_argument(
        "--label",
        type=_labelled_runs,
        action="append",
        default=[],
        metavar="NAME=RUN[,RUN...]",
        help="runs that differ in their seed alone, averaged under one name; may be given several times",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="kinds of layers (q_proj) or patterns for their names ('model.layers.3.*'); default: all in the blocks",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="the picture; its ending chooses the format (png, svg, pdf)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the numbers as well")
    options = parser.parse_args(argv)
    if not options.runs and not options.label:
        parser.error("give at least one RUN, or --label NAME=RUN")
    return options


def labelled(runs: Sequence[Path], labels: Sequence[tuple[str, list[Path]]]) -> dict[str, list[Path]]:
    """All runs by label; a run without one goes by its folder's name, or else by the path as given.

    Raises:
        ConfigError: if two labels are the same.
    """
    names = [run.resolve().name for run in runs]
    groups = [
        (name if names.count(name) == 1 else str(run), [run]) for name, run in zip(names, runs, strict=True)
    ]
    groups += labels
    result = dict(groups)
    if len(result) < len(groups):
        raise ConfigError("two of the runs have the same label; name them apart with --label NAME=RUN")
    return result


def draw(groups: Mapping[str, GroupSpectra]) -> Figure:
    """Mean spectrum, effective rank by kind of layer and, if any run measured it, the course over training."""
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
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)
    return figure


def table(groups: Mapping[str, GroupSpectra]) -> str:
    """A line for each label: mean ranks over layers and runs, and what full rank would be."""
    rows = [("", "runs", "step", "effective rank", f"above {NUMERICAL_RANK_THRESHOLD:.0%}", "of")]
    for label, group in groups.items():
        steps = sorted({run.step for run in group.runs})
        rows.append(
            (
                label,
                str(len(group.runs)),
                str(steps[0]) if len(steps) == 1 else f"{steps[0]}-{steps[-1]}",
                _text(group.effective_rank),
                _text(group.numerical_rank),
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


def write_json(groups: Mapping[str, GroupSpectra], file: Path) -> None:
    """Writes all numbers.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_json(groups), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {file}: the numbers cannot be written: {error}") from error


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
    """Least to largest over the runs; nothing to see for a single one."""
    axes.fill_between(positions, band.low, band.high, color=colour, alpha=0.2, linewidth=0)


def _full_rank(groups: Mapping[str, GroupSpectra]) -> int:
    """Of the largest layer drawn."""
    return max(len(group.spectrum.mean) for group in groups.values())


def _text(band: Band) -> str:
    (mean,), (low,), (high,) = band
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f}-{high:.1f})"


def _labelled_runs(text: str) -> tuple[str, list[Path]]:
    name, separator, runs = text.partition("=")
    paths = [Path(run) for run in runs.split(",")]
    if not name or not separator or not all(runs.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=RUN[,RUN...]")
    return name, paths
