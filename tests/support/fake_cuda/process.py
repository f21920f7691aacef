"""Runs functions in new processes, whose torch has a CUDA device that does nothing."""

import atexit
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from switchtitan.workbench.benchmark.gpu import device

needs_compiler = pytest.mark.skipif(
    device.unusable() is not None, reason=f"fake CUDA {device.unusable()}"
)


def run_check(check, *arguments):
    """Returns `check(*arguments)`, called in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn"), _install) as process:
        return process.submit(check, *arguments).result()


def _install():
    device.load()
    # Imports torch, after the library.
    from support.fake_cuda import collectives, python_api

    python_api.install()
    collectives.install()
    # Threads of the autograd engine may still run; an ordinary exit then calls std::terminate.
    atexit.register(os._exit, 0)
