"""What torch.compile does in tests, and what it has compiled."""

import os
from collections import Counter
from functools import wraps

import torch
from torch._dynamo.utils import get_compilation_metrics

BACKEND = "SWITCHTITAN_TEST_BACKEND"
"""Environment variable: the backend of torch.compile where the product names none."""


def choose_backend():
    """Makes `torch.compile` follow BACKEND in this process; default: aot_eager.

    Graph breaks and recompilations are those of Inductor, which takes seconds for each graph; its
    code is tested in tests/compiled.
    """
    compile = torch.compile

    @wraps(compile)
    def compile_with_backend(*args, **keywords):
        backend = os.environ.get(BACKEND, "aot_eager")
        return compile(*args, **{"backend": backend, **keywords})

    torch.compile = compile_with_backend


def compiled_functions():
    """Number of compilations of this process by the function's name, since metrics were cleared."""
    return Counter(entry.co_name for entry in get_compilation_metrics() if entry.co_name)


SWITCHLORA_COMPILED = {
    "forward": 1,  # all blocks
    "loss_and_gradient_": 1,
    "update_": 4,  # groups of factors of several shapes and sizes
}
"""What tiny runs of SwitchLoRA compile with all keys of `[compile]`: one graph each."""
