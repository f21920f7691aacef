"""Measures the rank of each linear layer's change during training."""

import logging
from dataclasses import dataclass

from torch import Tensor, nn

from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import World
from switchtitan.observability.reporter import Reporter
from switchtitan.spectra.spectrum import normalized_by_kind, summarize
from switchtitan.spectra.weight_change import Origin

logger = logging.getLogger(__name__)


@dataclass
class RankTelemetry:
    """A hook of the trainer that measures singular values of each linear layer's change."""

    model: nn.Module
    origin: Origin
    """The weights at step 0."""
    world: World
    interval: int
    """Optimizer steps between two measurements; the last step is also measured."""
    num_steps: int

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step == self.num_steps or step % self.interval == 0

    @full_precision()
    def after(self, step: int, reporter: Reporter) -> None:
        """Measures and reports the change at this step. Collective.

        Raises:
            CheckpointError: on the main rank, if the run's initial weights are no longer available.
        """
        is_main = self.world.is_main
        tensors = gather_on_main(self.model.named_parameters(), is_main)
        spectra, values = dict[str, Tensor](), dict[str, float]()
        if is_main:
            dense = self.origin.method.dense_weights(tensors)
            spectra = self.origin.spectra(dense, self.world.device)
            ranks = summarize(spectra)
            values = {
                "rank/effective_mean": ranks.effective,
                **{f"rank/effective/{kind}": of for kind, of in ranks.effective_by_kind.items()},
                **{
                    f"rank/effective_by_layer/{layer}": of
                    for layer, of in ranks.effective_by_layer.items()
                },
            }
        # The others wait here: rank 0's SVDs can exceed the timeout of the training step's
        # collectives.
        values = self.world.gather(values)[0]
        reporter.report(step, values)
        by_kind = normalized_by_kind(spectra)
        histograms = {f"rank/spectrum/{kind}": shares for kind, shares in by_kind.items()}
        reporter.report_histograms(step, histograms)
        if is_main:
            logger.info(
                "step %d: mean effective rank of the change %.1f of %d",
                step,
                values["rank/effective_mean"],
                max(map(len, spectra.values())),
            )
