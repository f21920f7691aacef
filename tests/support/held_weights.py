"""Weights in memory, to export."""

from collections.abc import Iterable, Mapping

from torch import Tensor


class HeldWeights:
    """See `hub.export_folder.DenseWeights`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}
