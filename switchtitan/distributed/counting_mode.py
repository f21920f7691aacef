"""A context that sees every operation on this rank's tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class CountingMode(TorchDispatchMode, ABC):
    """A context that calls `count` after every operation on plain tensors, those of backward passes
    included.

    Operations on DTensors are seen as the operations on local shards and the collectives that they
    consist of.
    """

    @abstractmethod
    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        """Counts `result = func(*args, **kwargs)`, an operation of torch's dispatcher."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # DTensor turns its operations into those of local tensors, which come here next.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result
