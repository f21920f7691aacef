"""What training has added to a model's linear layers: dense weights minus those of step 0, which no run keeps a copy of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from switchtitan.checkpoint import read_metadata
from switchtitan.contracts import LanguageModel, ModelConfig
from switchtitan.distributed.seeds import generator_for
from switchtitan.errors import CheckpointError
from switchtitan.hub.initial_weights import (
    fingerprint,
    read_dense_checkpoint,
    read_initial_weights,
    saved_model_config,
)
from switchtitan.models import MODELS
from switchtitan.spectra.spectrum import select_layers, singular_values

InitialValue = Callable[[str, torch.Size], Tensor]
"""(name of a plain model's parameter, its shape) -> the fp32 value on the CPU that it had at step 0."""


@dataclass(frozen=True)
class Origin:
    """Where a run's dense weights came from at step 0."""

    model_config: ModelConfig
    seed: int
    """Of the job."""
    initial_weights: str | None
    """What a warm start read; None where all weights were drawn from the seed."""
    fingerprint: str | None
    """Of what a warm start read, see `initial_weights.fingerprint`."""

    def block_names(self) -> list[str]:
        """Qualified names of the model's blocks, in order."""
        model = self._plain_model()
        return list(model.blocks())

    def open(self) -> InitialValue:
        """Returns what gives the initial values again, drawn one by one or, after a warm start, read now.

        Raises:
            CheckpointError: if the weights of a warm start are no longer there, or are others now.
        """
        model = self._plain_model()
        if self.initial_weights is None:
            return lambda name, shape: model.initial_value(
                name, shape, generator_for(self.seed, name)
            )
        source = Path(self.initial_weights)
        if not source.exists() or fingerprint(source) != self.fingerprint:
            raise CheckpointError(
                f"the change of the weights counts from those that the run started from, but {source} "
                f"{'has changed since' if source.exists() else 'is gone'}; put it back as it was, or measure no change "
                "([spectrum] interval = none)"
            )
        weights = read_initial_weights(source, self.model_config).tensors
        return lambda name, shape: weights[name].to(torch.float32)

    def _plain_model(self) -> LanguageModel:
        with torch.device("meta"):
            return MODELS.build(self.model_config)


def linear_layers(merged: Mapping[str, Tensor], origin: Origin) -> list[str]:
    """The linear layers inside the blocks by qualified name; embedding and head are not among them.

    Args:
        merged: the dense weights, by the plain model's names.
    """
    blocks = tuple(f"{block}." for block in origin.block_names())
    return [
        name.removesuffix(".weight")
        for name, weight in merged.items()
        if name.startswith(blocks) and weight.ndim == 2
    ]


def weight_changes(
    merged: Mapping[str, Tensor], origin: Origin, layers: Sequence[str]
) -> Iterator[tuple[str, Tensor]]:
    """The change [out, in] of each of the layers since step 0, by its name.

    Args:
        merged: the dense weights of now, fp32 on the CPU.

    Raises:
        CheckpointError: see `Origin.open`.
    """
    initial_value = origin.open()
    for layer in layers:
        weight = merged[f"{layer}.weight"]
        yield layer, weight - initial_value(f"{layer}.weight", weight.shape)


def checkpoint_spectra(checkpoint: Path, patterns: Sequence[str] = ("*",)) -> dict[str, Tensor]:
    """Singular values of the change of linear layers since the run's step 0, by the layer's name.

    Args:
        patterns: which layers, see `select_layers`.

    Raises:
        CheckpointError: if there is no whole checkpoint, or the weights that its run started from are no longer at hand.
        ConfigError: if a pattern fits no layer.
    """
    origin, merged = checkpoint_origin(checkpoint), read_dense_checkpoint(checkpoint)
    layers = select_layers(linear_layers(merged, origin), patterns)
    changes = tqdm(
        weight_changes(merged, origin, layers),
        desc=str(checkpoint),
        total=len(layers),
        unit="layer",
        leave=False,
        # Where the standard error is no terminal.
        disable=None,
    )
    return {layer: singular_values(change) for layer, change in changes}


def checkpoint_origin(checkpoint: Path) -> Origin:
    """Where the weights of the run that wrote the checkpoint came from.

    Raises:
        CheckpointError: if its metadata tells of no model that this version knows.
    """
    metadata = read_metadata(checkpoint)
    job = metadata.identity["job"]
    assert isinstance(job, dict)
    path, fingerprint = (
        metadata.train_state.get(key) for key in ("initial_weights", "initial_fingerprint")
    )
    return Origin(
        model_config=saved_model_config(checkpoint),
        seed=int(str(job["seed"])),
        initial_weights=None if path is None else str(path),
        fingerprint=None if fingerprint is None else str(fingerprint),
    )
