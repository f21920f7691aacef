"""Runs a check in a process whose torch has a fake CUDA device."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from support.fake_cuda import library

needs_compiler = pytest.mark.skipif(
    library.compiler() is None or sys.platform != "linux" or library.has_cuda_build(),
    reason="fake CUDA requires Linux, a C++ compiler (g++ or $CXX) and a CPU build of torch",
)


def run_check(check: Callable[..., Any], *arguments: Any, timeout_s: float = 800) -> Any:
    """Returns `check(*arguments)`, called in a new process; arguments and result are JSON.

    Args:
        check: a function of an importable module.

    Raises:
        AssertionError: with its output, if the process fails.
    """
    command = [
        sys.executable,
        "-m",
        __name__,
        check.__module__,
        check.__qualname__,
        json.dumps(arguments),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def _main() -> None:
    library.load()
    # Imports torch, after the library.
    from support.fake_cuda import collectives, python_api

    python_api.install()
    collectives.install()
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps(result), flush=True)
    # Threads of the autograd engine may still run; an ordinary exit then calls std::terminate.
    os._exit(0)


if __name__ == "__main__":
    _main()
