"""Copies between host and device for which the host waits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from support.fake_cuda.lines import project_line
from support.fake_cuda.operations import tensors_in
from support.fake_cuda.python_api import pinned_memory
from switchtitan.distributed.count_collectives import CountingMode

_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_foreach_copy_")
# They read a tensor's shape, not its values.
_ALLOCATIONS = ("aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
# These copy even a host scalar to the device.
_COPYING_NUMBERS = ("aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


class FindBlockingCopies(CountingMode):
    """A context that records every operation between host and device for which the host waits.

    The host waits for a copy unless it is non-blocking with page-locked host memory, and for a
    device operation with a host tensor, which is copied first. A host scalar (a 0-dim tensor) is a
    kernel argument.

    Attributes:
        found: each operation, and the project's line that calls it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(result)
        if kwargs.get("pin_memory"):
            for tensor in outputs:
                pinned_memory.add(tensor)
        if {tensor.device.type for tensor in inputs + outputs} == {"cpu", "cuda"} and not _passes(
            func, args, kwargs, inputs + outputs
        ):
            self.found.append(f"{func} at {project_line()}")


def is_non_blocking(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a copy's arguments ask the host not to wait."""
    return bool(kwargs.get("non_blocking")) or True in args[2:]


def _passes(func: Any, args: tuple, kwargs: Mapping[str, Any], tensors: list[Tensor]) -> bool:
    """Whether the host does not wait."""
    name = func.name().split(".")[0]
    if name in _ALLOCATIONS:
        return True
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if name in _COPIES:
        return is_non_blocking(args, kwargs) and all(tensor in pinned_memory for tensor in on_host)
    return name not in _COPYING_NUMBERS and all(tensor.ndim == 0 for tensor in on_host)
