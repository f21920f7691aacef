"""The tensors, arguments and caller of an operation of torch's dispatcher."""

import sys
from pathlib import Path

import switchtitan

_PROJECT = str(Path(switchtitan.__file__).parent)
_COUNTERS = "collectives.py"


def is_on_cuda(tensor):
    """Like `tensor.is_cuda`, which dispatches an operation for a fake tensor."""
    return tensor.device.type == "cuda"


def arguments_of(func, args, kwargs):
    """Yields each argument of the operation's schema, and its value or default."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        else:
            yield argument, kwargs.get(argument.name, argument.default_value)


def project_line():
    """The innermost line of `switchtitan` outside of counters; "torch" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PROJECT) and not name.endswith(_COUNTERS):
            return f"{name[len(_PROJECT) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"
