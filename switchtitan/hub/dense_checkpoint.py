"""Read the dense weights of a checkpoint of any method."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchtitan.checkpoint import read_metadata, read_tensors, saved_tensors
from switchtitan.contracts import Method, ModelConfig
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.registry import ConfigT, Registry

_PREFIX = "model."
"""Of the names of a model's tensors in a checkpoint."""


class DenseCheckpoint:
    """The fp32 weights of the plain model that is equivalent to a checkpoint's.

    Reads only the modules that are asked for, and no buffers.

    Args:
        checkpoint: as `find_given` returns it, which has verified all its bytes.

    Raises:
        CheckpointError: if the checkpoint is not complete, or this version does not know its model
            or method.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.config = saved_model_config(checkpoint)
        """The plain model's section."""
        self.method = saved_method(checkpoint)
        self._checkpoint = checkpoint
        with torch.device("meta"):
            model = MODELS.build(self.config)
            self.method.prepare_model(model)
        trained = dict(model.named_parameters())
        saved = saved_tensors(checkpoint)
        self.on_meta = {name: saved[_PREFIX + name] for name in trained if _PREFIX + name in saved}
        """The parameters as the method trains them, by name, on the meta device."""
        dense = self.method.dense_weights(self.on_meta)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
        """Shapes of the weights by the plain model's names."""

    @full_precision()
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns some of the weights; a CheckpointError if a tensor cannot be read."""
        names = list(names)
        dense = self.method.dense_weights(self.read_trained(map(module_of, names)))
        return {name: dense[name] for name in names}

    def read_trained(self, modules: Iterable[str]) -> dict[str, Tensor]:
        """Returns the parameters of modules and their children, as the method trains them."""
        prefixes = tuple({f"{module}." if module else "" for module in modules})
        names = [_PREFIX + name for name in self.on_meta if name.startswith(prefixes)]
        read = read_tensors(self._checkpoint, names)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in read.items()}


def module_of(name: str) -> str:
    """Returns the qualified name of the module that owns a tensor."""
    return name.rpartition(".")[0]


def read_dense_checkpoint(checkpoint: Path) -> dict[str, Tensor]:
    """Returns all dense fp32 weights of a checkpoint, see `DenseCheckpoint`."""
    dense = DenseCheckpoint(checkpoint)
    return dense.read(dense.shapes)


def saved_model_config(checkpoint: Path) -> ModelConfig:
    """Returns the section `[model]` of the run that saved a checkpoint, for any machine."""
    return _saved_section(checkpoint, MODELS).on_any_machine()


def saved_method(checkpoint: Path) -> Method:
    """Returns the method of the run that saved a checkpoint."""
    metadata = read_metadata(checkpoint)
    seed = metadata.identity_number("job", "seed")
    return METHODS.build(_saved_section(checkpoint, METHODS), metadata.step, seed)


def _saved_section(checkpoint: Path, registry: Registry[ConfigT, Any]) -> ConfigT:
    section = read_metadata(checkpoint).identity.get(registry.kind)
    if not isinstance(section, dict):
        raise CheckpointError(f"{checkpoint}: metadata.json has no section for the {registry.kind}")
    try:
        return registry.restore(section)
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint}: this version of switchtitan does not know its {registry.kind} ({error})"
        ) from error
