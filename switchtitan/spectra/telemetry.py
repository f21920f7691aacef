"""Measures the rank of each linear layer's change during training, one file a measurement."""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import Tensor, nn

from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import World
from switchtitan.files import make_folder, write_atomically
from switchtitan.hub.huggingface import read_safetensors
from switchtitan.observability.reporter import Reporter
from switchtitan.spectra.spectrum import (
    RankSummary,
    Spectra,
    normalized_by_kind,
    singular_values,
    summarize,
)
from switchtitan.spectra.weight_change import Origin

logger = logging.getLogger(__name__)

SPECTRA_FOLDER = "spectra"
"""Folder of the measurements, in the run's."""
_FILE = re.compile(r"step-(\d{9,})\.safetensors")


@dataclass(kw_only=True)
class RankTelemetry:
    """A hook of the trainer that measures singular values of each linear layer's change."""

    model: nn.Module
    dense_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """`Method.dense_weights` of the run's method."""
    origin: Origin
    """The weights at step 0."""
    folder: Path
    reporter: Reporter
    world: World
    interval: int
    """Optimizer steps between two measurements; the last step is also measured."""
    num_steps: int

    def is_due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step == self.num_steps or step % self.interval == 0

    def after(self, step: int) -> None:
        """Measures, writes and reports the change at this step. Collective.

        Raises:
            CheckpointError: on the main rank, if the run's initial weights are no longer available.
        """
        is_main = self.world.is_main
        tensors = gather_on_main(self.model.named_parameters(), is_main)
        spectra = self._measure(tensors, step) if is_main else {}
        # The others wait here: rank 0's SVDs can exceed the timeout of the training step's
        # collectives.
        values = self.world.gather(_metrics(summarize(spectra)) if is_main else {})[0]
        self.reporter.report(step, values)
        by_kind = normalized_by_kind(spectra)
        histograms = {f"rank/spectrum/{kind}": shares for kind, shares in by_kind.items()}
        self.reporter.report_histograms(step, histograms)
        if is_main:
            logger.info(
                "step %d: mean effective rank of the change %.1f of %d",
                step,
                values["rank/effective_mean"],
                max(map(len, spectra.values())),
            )

    @full_precision()
    def _measure(self, tensors: Mapping[str, Tensor], step: int) -> Spectra:
        changes = self.origin.changes(self.dense_weights(tensors))
        spectra = {name: singular_values(change.to(self.world.device)) for name, change in changes}
        try:
            write_spectra(self.folder, step, spectra)
        except OSError as error:
            logger.warning("could not write the spectra of step %d: %s", step, error)
        return spectra


def _metrics(ranks: RankSummary) -> dict[str, float]:
    """Returns ranks by TensorBoard tag."""
    values = {"rank/effective_mean": ranks.effective, "rank/numerical_mean": ranks.numerical}
    values |= {f"rank/effective/{kind}": of for kind, of in ranks.effective_by_kind.items()}
    by_layer = ranks.effective_by_layer.items()
    return values | {f"rank/effective_by_layer/{name}": rank for name, rank in by_layer}


def write_spectra(folder: Path, step: int, spectra: Spectra) -> Path:
    """Writes one measurement atomically; replaces an earlier one of the same step."""
    make_folder(folder)
    file = folder / f"step-{step:09d}.safetensors"
    write_atomically(file, save(dict(spectra), metadata={"step": str(step)}))
    return file


def read_spectra(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Returns all measurements in `folder` by step, in order; none if there is no such folder.

    Raises:
        CheckpointError: if a file is damaged.
    """
    files = folder.iterdir() if folder.is_dir() else []
    found = {int(match[1]): file for file in files if (match := _FILE.fullmatch(file.name))}
    return {step: read_safetensors(found[step]) for step in sorted(found)}
