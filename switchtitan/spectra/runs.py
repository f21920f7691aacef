"""The singular spectra of runs, read from what they left; averaged over seeds, and checked to be comparable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.contracts import ModelConfig
from switchtitan.errors import ConfigError
from switchtitan.hub.initial_weights import saved_model_config
from switchtitan.spectra.spectra_files import SPECTRA_FOLDER, read_spectra
from switchtitan.spectra.spectrum import (
    RankSummary,
    mean_normalized_spectrum,
    select_layers,
    summarize,
)
from switchtitan.spectra.weight_change import checkpoint_spectra


@dataclass(frozen=True)
class RunSpectra:
    """What a run's newest checkpoint, and its measurements on the way, tell of its weights' change since step 0."""

    checkpoint: Path
    step: int
    """Of the checkpoint."""
    model: ModelConfig
    spectra: Mapping[str, Tensor]
    """Of the checkpoint, by layer."""
    course: Mapping[int, float]
    """Mean effective rank by step, where the run measured it."""

    @property
    def ranks(self) -> RankSummary:
        """Of the checkpoint."""
        return summarize(self.spectra)


class Band(NamedTuple):
    """Numbers of several runs side by side."""

    mean: list[float]
    low: list[float]
    """The least over the runs."""
    high: list[float]


@dataclass(frozen=True)
class GroupSpectra:
    """Runs that differ in their seed alone, averaged."""

    runs: tuple[RunSpectra, ...]
    effective_rank: Band
    """One number."""
    numerical_rank: Band
    """One number."""
    effective_rank_by_kind: Mapping[str, Band]
    """One number each."""
    spectrum: Band
    """Mean over layers of the singular values as shares of the largest, [largest min(out, in)]."""
    course_steps: list[int]
    """At which all runs that measured did; empty where none did."""
    course: Band
    """Mean effective rank at these steps."""


def read_run_spectra(run: Path, patterns: Sequence[str] = ("*",)) -> RunSpectra:
    """Reads a run's newest whole checkpoint, or the given one, and computes its spectra.

    Args:
        patterns: which layers, see `select_layers`.

    Raises:
        CheckpointError: if there is none, or the weights that the run started from are no longer at hand.
        ConfigError: if a pattern fits no layer.
    """
    checkpoint = find_given(run)
    metadata = read_metadata(checkpoint)
    measured = read_spectra(checkpoint.resolve().parents[1] / SPECTRA_FOLDER)
    course = {
        step: summarize(
            {name: spectra[name] for name in select_layers(spectra, patterns)}
        ).effective
        for step, spectra in measured.items()
    }
    spectra = checkpoint_spectra(checkpoint, patterns)
    return RunSpectra(checkpoint, metadata.step, saved_model_config(checkpoint), spectra, course)


def check_same_model(runs: Sequence[RunSpectra]) -> None:
    """Makes sure that all runs train the same model; how they compute attention is free.

    Raises:
        ConfigError: naming the first two that do not and the keys in which they differ.
    """
    first = runs[0]
    for other in runs[1:]:
        one, another = first.model.architecture(), other.model.architecture()
        differing = [
            f"{key} = {one.get(key)} and {another.get(key)}"
            for key in sorted(one.keys() | another.keys())
            if one.get(key) != another.get(key)
        ]
        if differing:
            raise ConfigError(
                f"{first.checkpoint} and {other.checkpoint} hold different models ([model] {'; '.join(differing)}); "
                "ranks compare between runs of one model, so draw them in pictures of their own"
            )


def average(runs: Sequence[RunSpectra]) -> GroupSpectra:
    """Averages runs of one model."""
    ranks = [run.ranks for run in runs]
    measured = [run.course for run in runs if run.course]
    steps = sorted(set.intersection(*(set(course) for course in measured))) if measured else []
    return GroupSpectra(
        runs=tuple(runs),
        effective_rank=_band([[summary.effective] for summary in ranks]),
        numerical_rank=_band([[summary.numerical] for summary in ranks]),
        effective_rank_by_kind={
            kind: _band([[summary.effective_by_kind[kind]] for summary in ranks])
            for kind in ranks[0].effective_by_kind
        },
        spectrum=_band([mean_normalized_spectrum(run.spectra).tolist() for run in runs]),
        course_steps=steps,
        course=_band([[course[step] for step in steps] for course in measured])
        if steps
        else Band([], [], []),
    )


def as_json(groups: Mapping[str, GroupSpectra]) -> dict[str, object]:
    """All numbers by label, as plain values."""
    return {
        label: {
            "runs": [
                {
                    "checkpoint": str(run.checkpoint),
                    "step": run.step,
                    "effective_rank": run.ranks.effective,
                    "numerical_rank": run.ranks.numerical,
                    "effective_rank_by_layer": run.ranks.effective_by_layer,
                }
                for run in group.runs
            ],
            "effective_rank": _single(group.effective_rank),
            "numerical_rank": _single(group.numerical_rank),
            "effective_rank_by_kind": {
                kind: _single(band) for kind, band in group.effective_rank_by_kind.items()
            },
            "spectrum": group.spectrum._asdict(),
            "course": dict[str, object](group.course._asdict()) | {"step": group.course_steps},
        }
        for label, group in groups.items()
    }


def _band(rows: Sequence[Sequence[float]]) -> Band:
    """Over rows [runs, numbers]."""
    numbers = torch.tensor(rows, dtype=torch.float64)
    return Band(numbers.mean(0).tolist(), numbers.amin(0).tolist(), numbers.amax(0).tolist())


def _single(band: Band) -> dict[str, float]:
    return {key: numbers[0] for key, numbers in band._asdict().items()}
