"""Measures, while a run trains, the rank of what training has added to each linear layer's weight."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from switchtitan.observability.spectra_files import drop_spectra_after, write_spectra
from switchtitan.observability.spectrum import Spectra, singular_values, summarize
from switchtitan.weight_change import Origin, linear_layers, weight_changes

logger = logging.getLogger(__name__)


class RankTelemetry:
    """Singular values of W + s B A - W_init, or W - W_init, whenever it is called; holds no weights in between.

    Args:
        merged_state_dict: the dense weights of a model, see `contracts.Method`.
        origin: of the run's weights.
        folder: for one file of singular values per measurement.
        start_step: steps done before this run.
        device: on which the main rank computes.
        broadcast: the main rank's value on all ranks, however long it takes.
    """

    def __init__(
        self,
        *,
        merged_state_dict: Callable[[nn.Module], dict[str, Tensor]],
        origin: Origin,
        folder: Path,
        start_step: int,
        device: torch.device,
        is_main: bool,
        broadcast: Callable[[dict[str, float]], dict[str, float]],
    ) -> None:
        self._merged_state_dict = merged_state_dict
        self._origin = origin
        self._folder = folder
        self._last_step = start_step
        self._device = device
        self._is_main = is_main
        self._broadcast = broadcast

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Writes the singular values of this step's change; returns mean ranks by TensorBoard tag. Every rank must call.

        Raises:
            CheckpointError: on the main rank, if the weights that the run started from are no longer at hand.
        """
        merged = self._merged_state_dict(model)
        # The others wait here, for which a collective of the training step might not have the patience.
        return self._broadcast(self._measure(merged, step) if self._is_main else {})

    def _measure(self, merged: dict[str, Tensor], step: int) -> dict[str, float]:
        changes = weight_changes(merged, self._origin, linear_layers(merged, self._origin))
        spectra = {name: singular_values(change.to(self._device)) for name, change in changes}
        # What lies between was left by a run that was stopped, and went on from before it.
        drop_spectra_after(self._folder, self._last_step)
        self._last_step = step
        write_spectra(self._folder, step, spectra)
        values = rank_metrics(spectra)
        largest = max(map(len, spectra.values()))
        logger.info(
            "step %d: mean effective rank of the change %.1f of %d",
            step,
            values["rank/effective_mean"],
            largest,
        )
        return values


def rank_metrics(spectra: Spectra) -> dict[str, float]:
    """Mean ranks by TensorBoard tag: over all layers, and over those of each kind."""
    summary = summarize(spectra)
    of_kinds = {f"rank/effective/{kind}": rank for kind, rank in summary.effective_by_kind.items()}
    return {"rank/effective_mean": summary.effective, "rank/numerical_mean": summary.numerical} | of_kinds
