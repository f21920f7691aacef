"""The tensors and arguments of an operation of torch's dispatcher."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested sequences and mappings; faster than torch's pytrees."""
    found: list[Tensor] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, torch.Tensor):
        found.append(tree)
    elif isinstance(tree, (list, tuple)):
        for part in tree:
            _collect(part, found)
    elif isinstance(tree, dict):
        for part in tree.values():
            _collect(part, found)


def is_on_cuda(tensor: Tensor) -> bool:
    """Like `tensor.is_cuda`, which dispatches an operation for a fake tensor."""
    return tensor.device.type == "cuda"


def arguments_of(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each argument of the operation's schema, and its value or default."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        else:
            yield argument, kwargs.get(argument.name, argument.default_value)
