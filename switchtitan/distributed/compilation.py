"""Compilation of functions of tensors with static shapes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def compile_if(is_compiled: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns what compiles a function to one graph for each shape, or returns it as it is."""
    if is_compiled:
        return partial(torch.compile, fullgraph=True, dynamic=False)
    return _as_is


def _as_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
