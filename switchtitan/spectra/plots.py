"""Average spectra of runs over seeds, draw and tabulate them next to each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from matplotlib.figure import Figure

from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.errors import ConfigError
from switchtitan.hub.dense_checkpoint import saved_model_config
from switchtitan.spectra.spectrum import (
    NUMERICAL_RANK_THRESHOLD,
    mean_normalized_spectrum,
    select_layers,
    summarize,
)
from switchtitan.spectra.telemetry import SPECTRA_FOLDER, read_spectra
from switchtitan.spectra.weight_change import checkpoint_spectra

_PANELS: dict[str, tuple[str, dict[str, Any]]] = {
    "spectrum": (
        "-",
        {
            "title": "Singular values of the change",
            "xlabel": "index",
            "ylabel": "share of the largest (mean over layers)",
            "yscale": "log",
            "ylim": (1e-5, 1.5),  # below is fp32 noise
        },
    ),
    "by_kind": (
        "o",
        {"title": "Effective rank of the change", "ylabel": "mean over blocks", "ylim": (0, None)},
    ),
    "over_training": (
        ".-",
        {
            "title": "Effective rank over training",
            "xlabel": "step",
            "ylabel": "mean over layers",
            "ylim": (0, None),
        },
    ),
}
"""Curve -> how its points are drawn, and the axes."""


class Curve(TypedDict):
    """Mean and range over runs at each place `x`."""

    x: list[Any]
    mean: list[float]
    low: list[float]
    high: list[float]


Group = dict[str, Any]
"""What is drawn of runs that differ only in their seed: `checkpoints`, `steps` and, as `Curve`:
`ranks` (effective and numerical, averaged over layers), `spectrum` (shares of the largest singular
value), `by_kind` and `over_training` (effective ranks, the latter as measured by telemetry)."""


def measure(
    labels: Mapping[str, Sequence[Path]], patterns: Sequence[str] = ("*",)
) -> dict[str, Group]:
    """Computes spectra of the weights' change since step 0 for runs of one model, and averages.

    Args:
        labels: label -> runs, or checkpoints. Of a run it is the newest complete checkpoint.
        patterns: the layers, see `select_layers`.

    Raises:
        CheckpointError: if there is no checkpoint, or a run's initial weights are no longer
            available.
        ConfigError: if a pattern matches no layer, or the models differ.
    """
    checkpoints = {label: list(map(find_given, runs)) for label, runs in labels.items()}
    _check_same_model([checkpoint for group in checkpoints.values() for checkpoint in group])
    groups: dict[str, Group] = {}
    for label, group in checkpoints.items():
        curves = [_curves(checkpoint, patterns) for checkpoint in group]
        groups[label] = {
            "checkpoints": list(map(str, group)),
            "steps": [read_metadata(checkpoint).step for checkpoint in group],
            **{key: _average([one[key] for one in curves]) for key in curves[0]},
        }
    return groups


def _check_same_model(checkpoints: Sequence[Path]) -> None:
    models = {
        checkpoint: saved_model_config(checkpoint).architecture() for checkpoint in checkpoints
    }
    (first, model), *others = models.items()
    for other, its_model in others:
        if differing := [key for key in model | its_model if model.get(key) != its_model.get(key)]:
            raise ConfigError(
                f"{first} and {other} hold different models ([model] {', '.join(differing)}); "
                "ranks are comparable only within one model; draw separate pictures"
            )


def _curves(checkpoint: Path, patterns: Sequence[str]) -> dict[str, dict[Any, float]]:
    spectra = checkpoint_spectra(checkpoint, patterns)
    ranks = summarize(spectra)
    measured = read_spectra(checkpoint.resolve().parents[1] / SPECTRA_FOLDER)
    return {
        "ranks": {"effective": ranks.effective, "numerical": ranks.numerical},
        "by_kind": {kind.removesuffix("_proj"): of for kind, of in ranks.effective_by_kind.items()},
        "spectrum": dict(enumerate(mean_normalized_spectrum(spectra).tolist(), start=1)),
        "over_training": {
            step: summarize({name: of[name] for name in select_layers(of, patterns)}).effective
            for step, of in measured.items()
        },
    }


def _average(curves: Sequence[Mapping[Any, float]]) -> Curve:
    """Averages at the places that all curves have; a run without telemetry has none."""
    given = [curve for curve in curves if curve] or [{}]
    x = [place for place in given[0] if all(place in curve for curve in given)]
    values = torch.tensor([[curve[place] for place in x] for curve in given], dtype=torch.float64)
    return {
        "x": x,
        "mean": values.mean(0).tolist(),
        "low": values.amin(0).tolist(),
        "high": values.amax(0).tolist(),
    }


def table(groups: Mapping[str, Group]) -> str:
    """Returns a table with mean ranks over layers and runs, and the full rank, for each label."""
    rows = [["", "runs", "step", "effective rank", f"above {NUMERICAL_RANK_THRESHOLD:.0%}", "of"]]
    for label, group in groups.items():
        of: Curve = group["ranks"]
        ranks = [
            f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f}-{high:.1f})"
            for mean, low, high in zip(of["mean"], of["low"], of["high"], strict=True)
        ]
        steps = "-".join(map(str, sorted({min(group["steps"]), max(group["steps"])})))
        full_rank = str(len(group["spectrum"]["x"]))
        rows.append([label, str(len(group["steps"])), steps, *ranks, full_rank])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for label, *cells in rows:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *columns]))
    return "\n".join(lines)


def draw(groups: Mapping[str, Group]) -> Figure:
    """Draws mean spectrum, effective rank by kind of layer and, if measured, over training."""
    panels = [name for name in _PANELS if any(group[name]["x"] for group in groups.values())]
    figure = Figure(figsize=(4.8 * len(panels), 4.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        style, settings = _PANELS[name]
        for label, group in groups.items():
            curve: Curve = group[name]
            (line,) = axes.plot(curve["x"], curve["mean"], style, label=label)
            color = line.get_color()
            axes.vlines(curve["x"], curve["low"], curve["high"], color=color, alpha=0.4)
        axes.set(**settings)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure
