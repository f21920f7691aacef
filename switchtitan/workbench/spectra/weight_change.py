"""Measures the change of linear layers since step 0: its singular values and effective ranks."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from switchtitan.checkpoint.load import find_given
from switchtitan.contracts import Method, ModelConfig
from switchtitan.distributed.initial import plain_value
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import gather_on_main
from switchtitan.distributed.world import World
from switchtitan.errors import CheckpointError
from switchtitan.hub.huggingface import ReadWeight
from switchtitan.hub.initial_weights import DenseCheckpoint, checksum, find_weights, open_weights
from switchtitan.models import plain_model
from switchtitan.observability.reporter import Reporter
from switchtitan.progress import progress_bar

logger = logging.getLogger(__name__)

Spectra = Mapping[str, Tensor]
"""Singular values [min(out, in)] by the layer's qualified name, largest first."""


@dataclass(eq=False)
class Origin:
    """The dense weights that a run started from, drawn or read again when asked for."""

    config: ModelConfig
    """The plain model's section."""
    seed: int
    initial_weights: str | None
    """The path that initial weights were read from; None if all were drawn."""
    checksum: str | None
    """Of these weights, see `initial_weights.checksum`."""
    method: Method
    """The run's, which may start from other weights than these."""

    def __post_init__(self) -> None:
        self._model = plain_model(self.config)
        self._read: ReadWeight | None = None
        self._computed: dict[str, Tensor] = {}

    def open(self) -> None:
        """Reads again what was read at step 0; a CheckpointError if it has moved or changed."""
        if self.initial_weights is None or self._read is not None:
            return
        source = Path(self.initial_weights)
        if not source.exists() or checksum(source) != self.checksum:
            raise CheckpointError(
                f"cannot measure the weights' change since step 0: the initial weights {source} "
                f"{'have changed' if source.exists() else 'are missing'}; restore them, or set "
                "[spectrum] interval = none"
            )
        self._read = open_weights(find_weights(source), self.config).read

    def spectra(self, read: ReadWeight, device: torch.device) -> dict[str, Tensor]:
        """Returns the singular values of each linear layer's change since step 0, computed on
        `device`; see `open`. `read` returns the current dense weights, fp32 on the CPU."""
        self.open()
        blocks = tuple(f"{block}." for block in self._model.blocks())
        layers = [  # no embedding, no head
            (name, weight.shape)
            for name, weight in self._model.named_parameters()
            if name.startswith(blocks) and weight.dim() == 2
        ]
        spectra = dict[str, Tensor]()
        for name, shape in progress_bar("measuring ranks", layers, total=None, unit="layers"):
            change = read(name) - self._starting_weight(name, shape)
            spectra[name.removesuffix(".weight")] = singular_values(change.to(device))
        return spectra

    def _starting_weight(self, name: str, shape: torch.Size) -> Tensor:
        if name in self._computed:
            return self._computed[name]
        if self._read is None:
            weight = plain_value(self._model, self.seed, name, shape)
        else:
            weight = self._read(name).to(torch.float32)
        start = self.method.starting_weight(name, weight)
        if start is not weight:
            # It may be a decomposition, which takes longer than the measurement.
            self._computed[name] = start
        return start


def checkpoint_spectra(run: Path) -> tuple[int, dict[str, Tensor]]:
    """Returns the step of a checkpoint, or of a run's newest one, and the singular values of the
    linear layers' change until then, by name. Raises a CheckpointError if there is no complete one,
    or the run's initial weights are no longer available."""
    dense = DenseCheckpoint(find_given(run))
    metadata = dense.metadata
    path, checksum = (
        None if value is None else str(value)
        for value in map(metadata.train_state.get, ("initial_weights", "initial_fingerprint"))
    )
    seed = metadata.identity_value("job", "seed", int)
    origin = Origin(dense.config, seed, path, checksum, dense.method)
    return metadata.step, origin.spectra(dense.read, torch.device("cpu"))


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


# Matrices and their singular values, on plain tensors.
def singular_values(matrix: Tensor) -> Tensor:
    """Returns the singular values of a matrix [rows, columns], largest first, in fp32 on the CPU.

    Roots of the eigenvalues of the smaller Gram matrix in fp64 take a third of the time of an SVD.
    Values below 1e-8 of the largest are noise, but fp32 weights have a precision of only 6e-8.
    """
    wide = matrix.double()
    if wide.shape[0] > wide.shape[1]:
        wide = wide.T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return eigenvalues.clamp(min=0).sqrt().flip(0).to("cpu", torch.float32)


def effective_rank(values: Tensor) -> float:
    """Returns exp of the entropy of singular values [n], normalized to sum 1; 0 if all are 0.

    For r equal values it is r. (Roy and Vetterli 2007, "The effective rank: a measure of effective
    dimensionality", definition 1)
    """
    total = values.double().sum()
    if total == 0:
        return 0.0
    return torch.special.entr(values.double() / total).sum().exp().item()


def mean_effective_rank(spectra: Spectra) -> float:
    """Averages effective ranks over layers."""
    return fmean(map(effective_rank, spectra.values()))


def mean_normalized_spectrum(spectra: Spectra) -> Tensor:
    """Averages, over layers, singular values as shares of each layer's largest: [max min(out, in)].

    Layers with fewer values are padded with zeros. An unchanged layer counts as zero."""
    tiny = torch.finfo(torch.float32).tiny
    rows = [values / values.max().clamp(min=tiny) for values in spectra.values()]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).mean(dim=0)
