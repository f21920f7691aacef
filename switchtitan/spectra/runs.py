"""Read the spectra of runs, check that they are comparable, average them over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.checkpoint import find_given, read_metadata
from switchtitan.contracts import ModelConfig
from switchtitan.errors import ConfigError
from switchtitan.hub.dense_checkpoint import saved_model_config
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
    """Spectra of a run's weight change since step 0, from a checkpoint and from measurements."""

    checkpoint: Path
    step: int
    """The checkpoint's step."""
    model: ModelConfig
    spectra: Mapping[str, Tensor]
    """The checkpoint's singular values by layer."""
    course: Mapping[int, float]
    """Measured mean effective rank by step."""

    @property
    def ranks(self) -> RankSummary:
        """The checkpoint's ranks."""
        return summarize(self.spectra)


class Band(NamedTuple):
    """Mean and range of numbers over several runs."""

    mean: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class GroupSpectra:
    """The averages over runs that differ only in their seed."""

    runs: tuple[RunSpectra, ...]
    effective_rank: Band
    """[1]."""
    numerical_rank: Band
    """[1]."""
    effective_rank_by_kind: Mapping[str, Band]
    """[1] each."""
    spectrum: Band
    """[largest min(out, in)]: singular values as shares of the largest, averaged over layers."""
    course_steps: list[int]
    """Steps measured by every run that measured; empty if none did."""
    course: Band
    """[course_steps]: mean effective rank at these steps."""


def read_run_spectra(run: Path, patterns: Sequence[str] = ("*",)) -> RunSpectra:
    """Reads a run's newest complete checkpoint, or the given one, and computes its spectra.

    Args:
        patterns: the layers, see `select_layers`.

    Raises:
        CheckpointError: if there is none, or the run's initial weights are no longer available.
        ConfigError: if a pattern matches no layer.
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
    """Checks that all runs train the same model; the attention kernel may differ.

    Raises:
        ConfigError: names the first two runs that differ, and the keys.
    """
    first = runs[0]
    for other in runs[1:]:
        differing = model_differences(first.model, other.model)
        if differing:
            raise ConfigError(
                f"{first.checkpoint} and {other.checkpoint} hold different models ([model] "
                f"{'; '.join(differing)}); ranks are comparable only within one model; draw "
                "separate pictures"
            )


def model_differences(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns each key in which two models differ, with both values; not the attention kernel."""
    first, second = one.architecture(), other.architecture()
    return [
        f"{key} = {first.get(key)!r} and {second.get(key)!r}"
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
    ]


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
    """Returns all numbers by label, as plain values."""
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
    """Returns mean and range over the rows of [runs, numbers]."""
    numbers = torch.tensor(rows, dtype=torch.float64)
    return Band(numbers.mean(0).tolist(), numbers.amin(0).tolist(), numbers.amax(0).tolist())


def _single(band: Band) -> dict[str, float]:
    return {key: numbers[0] for key, numbers in band._asdict().items()}
