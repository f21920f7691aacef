"""Charts of the spectra that runs measured while they trained."""

from collections.abc import Mapping

import numpy as np

from switchtitan.report.charts import Metric, chart
from switchtitan.report.points import Points, plain
from switchtitan.report.tables import Column, cell, table
from switchtitan.spectra.plots import SPECTRUM_FLOOR
from switchtitan.spectra.spectrum import Spectra, mean_normalized_spectrum, summarize

_MAX_INDICES = 256
"""Singular values of a spectrum that are drawn, evenly spaced."""


def spectrum_charts(runs: Mapping[int, Mapping[int, Spectra]]) -> list[dict[str, object]]:
    """Returns the last spectrum and the effective rank over training.

    Args:
        runs: spectra by step, by the run's place in the report.
    """
    last = {place: _spectrum(measured[max(measured)]) for place, measured in runs.items()}
    ranks = {
        place: _course({step: summarize(of).effective for step, of in measured.items()})
        for place, measured in runs.items()
    }
    return [
        chart(
            "spectrum",
            Metric("Singular values", "share of the largest", is_log=True),
            last,
            across="index",
            floor=SPECTRUM_FLOOR,
        ),
        chart("effective_rank", Metric("Effective rank", "mean over layers"), ranks),
    ]


def rank_tables(runs: Mapping[int, Mapping[int, Spectra]]) -> dict[str, object]:
    """Returns the effective rank by kind of layer, at each run's last measurement."""
    ranks = {place: summarize(measured[max(measured)]) for place, measured in runs.items()}
    kinds = list(dict.fromkeys(kind for of in ranks.values() for kind in of.effective_by_kind))
    columns = {
        Column("step"): [cell(str(max(measured)), max(measured)) for measured in runs.values()],
        Column("all layers"): [cell(f"{of.effective:.1f}", of.effective) for of in ranks.values()],
    }
    for kind in kinds:
        columns[Column(kind)] = [
            cell(f"{rank:.1f}", rank)
            if (rank := of.effective_by_kind.get(kind)) is not None
            else cell(None)
            for of in ranks.values()
        ]
    return table("Effective rank by kind of layer", columns, list(runs))


def _spectrum(spectra: Spectra) -> Points:
    values = mean_normalized_spectrum(spectra).double().numpy()
    indices = np.unique(np.linspace(0, len(values) - 1, _MAX_INDICES).round().astype(int))
    return {"x": (indices + 1).tolist(), "y": plain(values[indices])}


def _course(ranks: Mapping[int, float]) -> Points:
    return {"x": list(ranks), "y": plain(list(ranks.values()))}
