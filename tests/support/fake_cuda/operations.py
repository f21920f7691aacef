"""The tensors and arguments of an operation of torch's dispatcher."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from switchtitan.distributed.count_collectives import CountingMode


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


def arguments_of(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields each argument of the operation's schema, and its value or default."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        else:
            yield argument, kwargs.get(argument.name, argument.default_value)


class Together(CountingMode):
    """A context in which several counters count, for the cost of one."""

    def __init__(self, *counters: CountingMode) -> None:
        super().__init__()
        self._counters = counters

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        for counter in self._counters:
            counter.count(func, args, kwargs, result)
