"""Measures, while a run trains, the rank of what training has added to each linear layer's weight."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from switchtitan.distributed.shards import gather_on_main
from switchtitan.observability.metrics import Reporter
from switchtitan.spectra.spectra_files import drop_spectra_after, write_spectra
from switchtitan.spectra.spectrum import Spectra, normalized_by_kind, singular_values, summarize
from switchtitan.spectra.weight_change import Origin, linear_layers, weight_changes

logger = logging.getLogger(__name__)


class RankTelemetry:
    """Singular values of W + s B A - W_init, or W - W_init, whenever it is called; holds no weights in between.

    Args:
        dense_weights: of the run's method, see `contracts.Method`.
        origin: of the run's weights.
        folder: for one file of singular values per measurement.
        start_step: steps done before this run.
        device: on which the main rank computes.
        broadcast: the main rank's value on all ranks, however long it takes.
    """

    def __init__(
        self,
        *,
        dense_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        origin: Origin,
        folder: Path,
        start_step: int,
        device: torch.device,
        is_main: bool,
        broadcast: Callable[[dict[str, float]], dict[str, float]],
    ) -> None:
        self._dense_weights = dense_weights
        self._origin = origin
        self._folder = folder
        self._last_step = start_step
        self._device = device
        self._is_main = is_main
        self._broadcast = broadcast

    def __call__(self, model: nn.Module, step: int, reporter: Reporter) -> None:
        """Writes the singular values of this step's change, and reports ranks and spectra. Every rank must call.

        Raises:
            CheckpointError: on the main rank, if the weights that the run started from are no longer at hand.
        """
        tensors = gather_on_main(model.named_parameters(), self._is_main)
        spectra = self._measure(self._dense_weights(tensors), step) if self._is_main else {}
        # The others wait here, for which a collective of the training step might not have the patience.
        values = self._broadcast(rank_metrics(spectra) if self._is_main else {})
        reporter.report(step, values)
        reporter.report_histograms(step, spectrum_histograms(spectra))
        if self._is_main:
            largest = max(map(len, spectra.values()))
            logger.info(
                "step %d: mean effective rank of the change %.1f of %d",
                step,
                values["rank/effective_mean"],
                largest,
            )

    def _measure(self, dense: dict[str, Tensor], step: int) -> Spectra:
        changes = weight_changes(dense, self._origin, linear_layers(dense, self._origin))
        spectra = {name: singular_values(change.to(self._device)) for name, change in changes}
        # What lies between was left by a run that was stopped, and went on from before it.
        drop_spectra_after(self._folder, self._last_step)
        self._last_step = step
        write_spectra(self._folder, step, spectra)
        return spectra


def rank_metrics(spectra: Spectra) -> dict[str, float]:
    """Ranks by TensorBoard tag: means over all layers and over those of each kind, and each layer's own."""
    summary = summarize(spectra)
    of_kinds = {f"rank/effective/{kind}": rank for kind, rank in summary.effective_by_kind.items()}
    of_layers = {
        f"rank/effective_by_layer/{name}": rank for name, rank in summary.effective_by_layer.items()
    }
    means = {"rank/effective_mean": summary.effective, "rank/numerical_mean": summary.numerical}
    return means | of_kinds | of_layers


def spectrum_histograms(spectra: Spectra) -> dict[str, Tensor]:
    """By TensorBoard tag: for each kind of layer, singular values as shares of the largest one of their layer."""
    return {f"rank/spectrum/{kind}": shares for kind, shares in normalized_by_kind(spectra).items()}
