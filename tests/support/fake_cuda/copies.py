"""Copies between host and device for which the host waits."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import switchtitan
from support.fake_cuda.python_api import pinned_memory
from switchtitan.distributed.count_collectives import CountingMode

_PROJECT = Path(switchtitan.__file__).parent
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
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if kwargs.get("pin_memory") or (
            func.is_view and any(tensor in pinned_memory for tensor in inputs)
        ):
            for tensor in outputs:
                pinned_memory.add(tensor)
        if {tensor.device.type for tensor in inputs + outputs} == {"cpu", "cuda"} and not _passes(
            func, args, kwargs, inputs + outputs
        ):
            self.found.append(f"{func} at {_line()}")


def _passes(func: Any, args: tuple, kwargs: Mapping[str, Any], tensors: list[Tensor]) -> bool:
    """Whether the host does not wait."""
    name = func.name().split(".")[0]
    if name in _ALLOCATIONS:
        return True
    on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
    if name in _COPIES:
        non_blocking = kwargs.get("non_blocking") or True in args[2:]
        return bool(non_blocking) and all(tensor in pinned_memory for tensor in on_host)
    return name not in _COPYING_NUMBERS and all(tensor.ndim == 0 for tensor in on_host)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _line() -> str:
    """The innermost line of the project outside this context."""
    frames = [
        f"{Path(frame.filename).relative_to(_PROJECT)}:{frame.lineno}"
        for frame in traceback.extract_stack()
        if Path(frame.filename).is_relative_to(_PROJECT)
        and not frame.filename.endswith("count_collectives.py")
    ]
    return frames[-1] if frames else "torch"
