"""Measures the rank of each linear layer's change during training."""

import logging
from dataclasses import dataclass

from torch import nn

from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import World
from switchtitan.observability.reporter import Reporter
from switchtitan.spectra.weight_change import Origin, mean_effective_rank

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
        """Measures and reports the change at this step; collective. Raises a CheckpointError if the
        run's initial weights are no longer available."""
        tensors = gather_on_main(self.model.named_parameters(), self.world.is_main)

        def measure() -> dict[str, float]:
            dense = self.origin.method.dense_weights(tensors)
            spectra = self.origin.spectra(dense.__getitem__, self.world.device)
            mean, full = mean_effective_rank(spectra), max(map(len, spectra.values()))
            logger.info("step %d: mean effective rank of the change %.1f of %d", step, mean, full)
            return {"rank/effective_mean": mean}

        # The others wait: SVDs can exceed the timeout of the training step's collectives.
        reporter.report(step, self.world.on_main(measure))
