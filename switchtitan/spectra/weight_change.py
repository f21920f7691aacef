"""Computes the change of linear layers since step 0. Initial weights are drawn or read again."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from switchtitan.checkpoint.load import find_given
from switchtitan.contracts import Method, ModelConfig
from switchtitan.distributed.initial import ReadRows, plain_value
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import DenseCheckpoint
from switchtitan.hub.initial_weights import checksum, find_weights, open_weights
from switchtitan.models import plain_model
from switchtitan.progress import progress_bar
from switchtitan.spectra.spectrum import singular_values


class Origin:
    """The dense weights that a run started from, drawn or read again when asked for.

    Args:
        config: the plain model's section.
        seed: `[job] seed`.
        initial_weights: the path that initial weights were read from; None if all were drawn.
        checksum: of these weights, see `initial_weights.checksum`.
        method: the run's method, which may start from other weights than these.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        initial_weights: str | None,
        checksum: str | None,
        method: Method,
    ) -> None:
        self._config, self._seed, self.method = config, seed, method
        self._model = plain_model(config)
        blocks = tuple(f"{block}." for block in self._model.blocks())
        self._layers = [
            name.removesuffix(".weight")
            for name, weight in self._model.named_parameters()
            if name.startswith(blocks) and weight.dim() == 2
        ]
        """Qualified names of the linear layers in blocks: no embedding, no head."""
        self._source = None if initial_weights is None else Path(initial_weights)
        self._checksum = checksum
        self._read: ReadRows | None = None
        self._computed: dict[str, Tensor] = {}

    def open(self) -> None:
        """Reads again what was read at step 0; a CheckpointError if it has moved or changed."""
        if self._source is None or self._read is not None:
            return
        if not self._source.exists() or checksum(self._source) != self._checksum:
            raise CheckpointError(
                f"cannot measure the weights' change since step 0: the initial weights "
                f"{self._source} {'have changed' if self._source.exists() else 'are missing'}; "
                "restore them, or set [spectrum] interval = none"
            )
        self._read = open_weights(find_weights(self._source), self._config)

    def spectra(self, dense: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Returns the singular values of each linear layer's change since step 0; see `open`.

        Args:
            dense: the current dense weights, fp32 on the CPU.
            device: computes them.
        """
        self.open()
        spectra = dict[str, Tensor]()
        for layer in progress_bar("measuring ranks", self._layers, total=None, unit="layers"):
            name, weight = f"{layer}.weight", dense[f"{layer}.weight"]
            change = weight - self._starting_weight(name, weight.shape)
            spectra[layer] = singular_values(change.to(device))
        return spectra

    def _starting_weight(self, name: str, shape: torch.Size) -> Tensor:
        if name in self._computed:
            return self._computed[name]
        if self._read is None:
            weight = plain_value(self._model, self._seed, name, shape)
        else:
            weight = self._read(name, range(shape[0])).to(torch.float32)
        start = self.method.starting_weight(name, weight)
        if start is not weight:
            # It may be a decomposition, which takes longer than the measurement.
            self._computed[name] = start
        return start


def checkpoint_spectra(run: Path) -> tuple[int, dict[str, Tensor]]:
    """Returns the step of a checkpoint, or of a run's newest one, and the singular values of the
    linear layers' change until then, by name. Raises a CheckpointError if there is no complete
    one, or the run's initial weights are no longer available."""
    dense = DenseCheckpoint(find_given(run))
    metadata = dense.metadata
    path, checksum = (
        None if value is None else str(value)
        for value in map(metadata.train_state.get, ("initial_weights", "initial_fingerprint"))
    )
    seed = metadata.identity_value("job", "seed", int)
    origin = Origin(dense.config, seed, path, checksum, dense.method)
    return metadata.step, origin.spectra(dense.read(), torch.device("cpu"))
