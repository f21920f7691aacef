"""Reads the dense weights of a checkpoint of any method."""

from pathlib import Path

from torch import Tensor

from switchtitan.checkpoint.load import SavedTensors, read_metadata
from switchtitan.checkpoint.save import MODEL
from switchtitan.distributed.precision import full_precision
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.hub.huggingface import check_shapes
from switchtitan.methods import METHODS
from switchtitan.models import MODELS, plain_model


class DenseCheckpoint:
    """The fp32 weights of the plain model that is equivalent to a checkpoint's.

    `checkpoint` is as `find_given` returns it, which has verified all its bytes. Reads only the
    modules that are asked for, and no buffers. Raises a CheckpointError if the checkpoint is not
    complete, its tensors are not its model's, or this version does not know its model or method.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.metadata = read_metadata(checkpoint)
        saved = self.metadata.identity
        try:
            self.config = MODELS.restore(saved.get("model", {})).on_any_machine()
            """The plain model's section."""
            section = METHODS.restore(saved.get("method", {}))
        except ConfigError as error:
            raise CheckpointError(
                f"{checkpoint}: this version of switchtitan does not know {error}"
            ) from error
        seed = self.metadata.identity_value("job", "seed", int)
        self.method = METHODS.build(section, self.metadata.step, seed)
        model = plain_model(self.config)
        self.method.prepare_model(model)
        trained = dict(model.named_parameters())
        self._tensors = SavedTensors(checkpoint)
        found = self._tensors.on_meta
        self.on_meta = {name: found[MODEL + name] for name in trained if MODEL + name in found}
        """The parameters as the method trains them, by name, on the meta device."""
        dense = self.method.dense_weights(self.on_meta)
        self._stored = {name for name in dense if dense[name] is self.on_meta.get(name)}
        check_shapes(dense, self.config, f"{checkpoint}")

    @full_precision()
    def read(self, name: str) -> Tensor:
        """Returns a weight; a CheckpointError if it cannot be read."""
        return self.method.dense_weights(self.read_trained(module_of(name)))[name]

    def read_rows(self, name: str, rows: range) -> Tensor:
        """Returns rows of a weight: what is saved of them, or computed from its entire module."""
        if name in self._stored:
            return self._tensors.read_rows(MODEL + name, rows)
        return self.read(name)[rows.start : rows.stop]

    def read_trained(self, module: str) -> dict[str, Tensor]:
        """Returns the parameters of a module and its children, as the method trains them."""
        prefix = f"{module}." if module else ""
        names = [MODEL + name for name in self.on_meta if name.startswith(prefix)]
        read = self._tensors.read_full(names)
        return {name.removeprefix(MODEL): tensor for name, tensor in read.items()}


def module_of(name: str) -> str:
    """Returns the qualified name of the module that owns a tensor."""
    return name.rpartition(".")[0]
