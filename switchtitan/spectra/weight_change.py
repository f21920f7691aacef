"""Compute the change of linear layers since step 0. Initial weights are drawn or read again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from switchtitan.checkpoint import read_metadata
from switchtitan.contracts import LanguageModel, Method, ModelConfig
from switchtitan.distributed.initial import plain_value
from switchtitan.errors import CheckpointError
from switchtitan.hub.dense_checkpoint import (
    read_dense_checkpoint,
    saved_method,
    saved_model_config,
)
from switchtitan.hub.initial_weights import fingerprint, read_initial_weights
from switchtitan.models import MODELS
from switchtitan.spectra.spectrum import select_layers, singular_values

InitialValue = Callable[[str, torch.Size], Tensor]
"""(name of a plain model's parameter, its shape) -> its fp32 value at step 0, on the CPU."""


@dataclass(frozen=True)
class Origin:
    """The origin of a run's dense weights at step 0."""

    model_config: ModelConfig
    seed: int
    """`[job] seed`."""
    initial_weights: str | None
    """The path that initial weights were read from; None if all were drawn from the seed."""
    fingerprint: str | None
    """The checksum of these weights, see `initial_weights.fingerprint`."""
    method: Method
    """The run's method, which may start from other weights than these."""
    _computed: dict[str, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Weights that the method starts from instead, by name, once they are asked for."""

    def block_names(self) -> list[str]:
        """Returns the qualified names of the model's blocks, in order."""
        model = self._plain_model()
        return list(model.blocks())

    def open(self) -> InitialValue:
        """Returns a function for initial values: drawn again, or from the weights read at step 0.

        Raises:
            CheckpointError: if the weights that were read have moved or changed.
        """
        model = self._plain_model()
        if self.initial_weights is None:
            return lambda name, shape: self._start(
                name, lambda: plain_value(model, self.seed, name, shape)
            )
        source = Path(self.initial_weights)
        if not source.exists() or fingerprint(source) != self.fingerprint:
            raise CheckpointError(
                f"cannot measure the weights' change since step 0: the initial weights {source} "
                f"{'have changed' if source.exists() else 'are missing'}; restore them, or set "
                "[spectrum] interval = none"
            )
        weights = read_initial_weights(source, self.model_config).tensors
        return lambda name, shape: self._start(name, lambda: weights[name].to(torch.float32))

    def _start(self, name: str, plain: Callable[[], Tensor]) -> Tensor:
        """Returns the weight that the method starts from.

        Keeps it if the method computes another one: that may be a decomposition, which takes longer
        than the measurement. Others are drawn or read again.

        Args:
            plain: returns the plain model's weight.
        """
        if name in self._computed:
            return self._computed[name]
        weight = plain()
        start = self.method.starting_weight(name, weight)
        if start is not weight:
            self._computed[name] = start
        return start

    def _plain_model(self) -> LanguageModel:
        with torch.device("meta"):
            return MODELS.build(self.model_config)


def linear_layers(shapes: Mapping[str, Sequence[int]], block_names: Iterable[str]) -> list[str]:
    """Returns the qualified names of the linear layers in the blocks, without embedding and head.

    Args:
        shapes: of the dense weights, by the plain model's names.
    """
    blocks = tuple(f"{block}." for block in block_names)
    return [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith(blocks) and len(shape) == 2
    ]


def weight_changes(
    merged: Mapping[str, Tensor], origin: Origin, layers: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields name and change [out, in] since step 0 of each layer.

    Args:
        merged: the current dense weights, fp32 on the CPU.

    Raises:
        CheckpointError: see `Origin.open`.
    """
    initial_value = origin.open()
    for layer in layers:
        weight = merged[f"{layer}.weight"]
        yield layer, weight - initial_value(f"{layer}.weight", weight.shape)


def checkpoint_spectra(checkpoint: Path, patterns: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    """Returns the singular values of the linear layers' change since step 0, by name.

    Args:
        patterns: the layers, see `select_layers`.

    Raises:
        CheckpointError: if there is no complete checkpoint, or the run's initial weights are no
            longer available.
        ConfigError: if a pattern matches no layer.
    """
    origin, merged = checkpoint_origin(checkpoint), read_dense_checkpoint(checkpoint)
    shapes = {name: weight.shape for name, weight in merged.items()}
    layers = select_layers(linear_layers(shapes, origin.block_names()), patterns)
    changes = tqdm(
        weight_changes(merged, origin, layers),
        desc=str(checkpoint),
        total=len(layers),
        unit="layer",
        leave=False,
        # None: no bar unless standard error is a terminal.
        disable=None,
    )
    return {layer: singular_values(change) for layer, change in changes}


def checkpoint_origin(checkpoint: Path) -> Origin:
    """Returns the origin of the weights of the run that saved a checkpoint.

    Raises:
        CheckpointError: if this version does not know its model.
    """
    metadata = read_metadata(checkpoint)
    path, fingerprint = (
        metadata.train_state.get(key) for key in ("initial_weights", "initial_fingerprint")
    )
    return Origin(
        model_config=saved_model_config(checkpoint),
        seed=metadata.identity_number("job", "seed"),
        initial_weights=None if path is None else str(path),
        fingerprint=None if fingerprint is None else str(fingerprint),
        method=saved_method(checkpoint),
    )
