"""Runs functions in new processes, whose torch has a CUDA device that does nothing."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from switchtitan.benchmark.gpu import device

needs_compiler = pytest.mark.skipif(
    device.unusable() is not None, reason=f"fake CUDA {device.unusable()}"
)


def run_check(check, *arguments):
    """Returns `check(*arguments)`, called in a new process; arguments and result are JSON."""
    words = [check.__module__, check.__qualname__, json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command, keys = [sys.executable, "-m", __name__, *words], {"capture_output": True, "text": True}
    finished = subprocess.run(command, env=environment, timeout=1800, **keys)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def _main():
    device.load()
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
