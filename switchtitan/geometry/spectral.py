"""Spectra of the linear layers of a run's checkpoints, and of the updates between them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from switchtitan.geometry.matrices import Layers, MatrixGeometry, matrix_geometry, mean_geometry
from switchtitan.geometry.runs import Run
from switchtitan.progress import progress_bar
from switchtitan.spectra.spectrum import singular_values


@dataclass(frozen=True)
class WeightGeometry:
    """The layers' weights in a checkpoint, or their change between two."""

    from_step: int | None
    """The earlier checkpoint's step; None for the weights themselves."""
    step: int
    layers: Layers

    @property
    def mean(self) -> MatrixGeometry:
        """The mean over layers."""
        return mean_geometry(list(self.layers.values()))


@dataclass(frozen=True)
class SpectralGeometry:
    """The weights of a run's checkpoints and its updates; lists are empty if not measured."""

    weights: list[WeightGeometry]
    """For each checkpoint."""
    updates: list[WeightGeometry]
    """W of a checkpoint minus W of the one before it."""
    updates_since_first: list[WeightGeometry]
    """W of a checkpoint minus W of the first one; from the third checkpoint on."""


def spectral_geometry(
    run: Run, layers: Sequence[str], *, of_weights: bool, of_updates: bool
) -> SpectralGeometry:
    """Computes one singular value decomposition for each matrix.

    `relative_norm` of an update divides by the norm of W in the earlier checkpoint. Keeps one
    layer of all checkpoints in memory at a time.
    """
    steps = run.steps
    pairs = run.consecutive_steps if of_updates else []
    first_pairs = [(steps[0], step) for step in steps[2:]] if of_updates else []
    found: dict[tuple[int | None, int], dict[str, MatrixGeometry]] = {
        key: {} for key in [*((None, step) for step in steps if of_weights), *pairs, *first_pairs]
    }
    for layer in progress_bar(f"{run.label}: spectra", layers, total=len(layers), unit="layers"):
        name = f"{layer}.weight"
        weights = {step: run.read(step, [name])[name] for step in steps}
        for (from_step, step), of_layer in found.items():
            of_layer[layer] = _geometry(weights, from_step, step)

    def measured(keys: Collection[tuple[int | None, int]]) -> list[WeightGeometry]:
        return [WeightGeometry(*key, found[key]) for key in keys]

    return SpectralGeometry(
        weights=measured([key for key in found if key[0] is None]),
        updates=measured([*pairs]),
        updates_since_first=measured([*first_pairs]),
    )


def _geometry(weights: dict[int, Tensor], from_step: int | None, step: int) -> MatrixGeometry:
    if from_step is None:
        return matrix_geometry(singular_values(weights[step]))
    reference = weights[from_step].double().norm().item()
    return matrix_geometry(singular_values(weights[step] - weights[from_step]), reference)
