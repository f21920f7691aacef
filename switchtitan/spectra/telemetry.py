"""Measure the rank of each linear layer's weight change during training."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import gather_on_main
from switchtitan.observability.metrics import Reporter
from switchtitan.spectra.spectra_files import drop_spectra_after, write_spectra
from switchtitan.spectra.spectrum import Spectra, normalized_by_kind, singular_values, summarize
from switchtitan.spectra.weight_change import Origin, linear_layers, weight_changes

logger = logging.getLogger(__name__)


class RankTelemetry:
    """Measures singular values of W + s B A - W_init, or W - W_init.

    Keeps no weights, except in host memory of the main rank those that a method computes as W_init.

    Args:
        dense_weights: `Method.dense_weights` of the run's method.
        origin: the origin of the run's weights.
        folder: the folder for measurements, one file each.
        start_step: the step that the run resumes from.
        device: the device on which the main rank computes.
        broadcast: sends the main rank's value to all ranks, without a timeout.
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
        """Measures, writes and reports the change at this step. Collective.

        Raises:
            CheckpointError: on the main rank, if the run's initial weights are no longer available.
        """
        tensors = gather_on_main(model.named_parameters(), self._is_main)
        spectra = self._measure(tensors, step) if self._is_main else {}
        # The others wait here: rank 0's SVDs can exceed the timeout of the training step's
        # collectives.
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

    @full_precision()
    def _measure(self, tensors: Mapping[str, Tensor], step: int) -> Spectra:
        dense = self._dense_weights(tensors)
        shapes = {name: weight.shape for name, weight in dense.items()}
        layers = linear_layers(shapes, self._origin.block_names())
        changes = weight_changes(dense, self._origin, layers)
        spectra = {name: singular_values(change.to(self._device)) for name, change in changes}
        try:
            # Those in between are left by a stopped run that resumed from an earlier checkpoint.
            drop_spectra_after(self._folder, self._last_step)
            write_spectra(self._folder, step, spectra)
        except OSError as error:
            logger.warning("could not write the spectra of step %d: %s", step, error)
        self._last_step = step
        return spectra


def rank_metrics(spectra: Spectra) -> dict[str, float]:
    """Returns ranks by TensorBoard tag: means over all layers, means by kind, and by layer."""
    summary = summarize(spectra)
    by_kind = {f"rank/effective/{kind}": rank for kind, rank in summary.effective_by_kind.items()}
    by_layer = {
        f"rank/effective_by_layer/{name}": rank for name, rank in summary.effective_by_layer.items()
    }
    means = {"rank/effective_mean": summary.effective, "rank/numerical_mean": summary.numerical}
    return means | by_kind | by_layer


def spectrum_histograms(spectra: Spectra) -> dict[str, Tensor]:
    """Returns, by TensorBoard tag and kind, singular values as shares of their layer's largest."""
    return {f"rank/spectrum/{kind}": shares for kind, shares in normalized_by_kind(spectra).items()}
