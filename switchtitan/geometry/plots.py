"""Draw the geometry of runs side by side: one panel for each part that was measured."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from switchtitan.geometry.measure import Geometry

_SIZE = 4.4
"""Inches of a panel."""


def draw(measured: Sequence[Geometry]) -> Figure:
    """Draws ranks and barriers over the steps, sharpness by direction, and linear CKA by block.

    Without a measured part its panel is missing.
    """
    panels = [panel for panel, is_measured in _PANELS if any(map(is_measured, measured))]
    figure = Figure(figsize=(_SIZE * max(2, len(panels)), _SIZE), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, geometry in enumerate(measured):
            panel(axes, geometry, f"C{index}")
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_legend(figure, measured)
    return figure


def _draw_legend(figure: Figure, measured: Sequence[Geometry]) -> None:
    axes = figure.axes[0]
    for index, geometry in enumerate(measured):
        axes.plot([], [], color=f"C{index}", label=geometry.run.label)
    lines, labels = axes.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=min(len(labels), 4))


def _draw_ranks(axes: Axes, geometry: Geometry, colour: str) -> None:
    spectral = geometry.spectral
    if spectral is not None:
        for found, style in ((spectral.weights, ":"), (spectral.updates, "-")):
            shares = [one.mean.effective_rank_ratio for one in found]
            axes.plot([one.step for one in found], shares, style, marker=".", color=colour)
    axes.set(
        title="Effective rank",
        xlabel="step (dotted: weights, solid: updates)",
        ylabel="share of full rank (mean over layers)",
        ylim=(0, 1.02),
    )


def _draw_sharpness(axes: Axes, geometry: Geometry, colour: str) -> None:
    found = geometry.sharpness
    if found is not None:
        values = [found.mean_random, *found.principal]
        axes.plot(range(len(values)), values, "o", color=colour)
        axes.vlines(0, min(found.random), max(found.random), color=colour)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.xaxis.set_major_locator(MultipleLocator(1))
    axes.set(
        title="Expected sharpness",
        xlabel="0: random directions, 1, 2, ...: principal ones",
        ylabel="rise of the loss (nats)",
    )


def _draw_barriers(axes: Axes, geometry: Geometry, colour: str) -> None:
    barriers = {step: found.height for (_, step), found in (geometry.barriers or {}).items()}
    to_other = {step: found.height for step, found in (geometry.barriers_to_other or {}).items()}
    for heights, style in ((barriers, "-"), (to_other, "--")):
        axes.plot(list(heights), list(heights.values()), style, marker=".", color=colour)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        title="Barriers",
        xlabel="step (solid: from the one before, dashed: to the other run)",
        ylabel="rise of the loss above the chord (nats)",
    )


def _draw_activations(axes: Axes, geometry: Geometry, colour: str) -> None:
    if geometry.activations is not None:
        steps = list(geometry.activations)
        for number, step in enumerate(steps, start=1):
            values = [found.linear_cka for found in geometry.activations[step].values()]
            opacity = 0.2 + 0.8 * (number / len(steps))
            axes.plot(range(len(values)), values, ".-", color=colour, alpha=opacity)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        title="Activations against the other run",
        xlabel="block (darker: later steps)",
        ylabel="linear CKA",
        ylim=(0, 1.02),
    )


_PANELS: list[tuple[Callable[[Axes, Geometry, str], None], Callable[[Geometry], bool]]] = [
    (_draw_ranks, lambda geometry: geometry.spectral is not None),
    (_draw_sharpness, lambda geometry: geometry.sharpness is not None),
    (_draw_barriers, lambda geometry: geometry.barriers is not None),
    (_draw_activations, lambda geometry: geometry.activations is not None),
]
"""Function that draws a run in a panel, and whether the run has what it draws."""
