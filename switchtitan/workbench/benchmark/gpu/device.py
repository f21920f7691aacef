"""A CUDA device that does nothing for torch's CPU build: built once, loaded before torch."""

import atexit
import ctypes
import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.metadata import distribution, version
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

from switchtitan.errors import EnvironmentMismatchError, UserError

T = TypeVar("T")
_SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_TORCH = Path(str(distribution("torch").locate_file("torch")))
"""The folder of the package torch, which is not imported."""


def unusable() -> str | None:
    """Returns why this machine cannot have the device; None if it can."""
    if sys.platform != "linux":
        return "requires Linux"
    if (_TORCH / "lib" / "libtorch_cuda.so").exists():
        return "requires a CPU build of torch, since this one has a CUDA device of its own"
    if _compiler() is None:
        return "requires a C++ compiler; install g++, or set CXX"
    return None


def call_with_gpus(calls: Sequence[tuple[str, Callable[[], T]]]) -> list[T]:
    """Returns the results of picklable functions, each called in a process that compiles for a GPU
    of its architecture, e.g. "sm_90", which the machine does not have.

    The processes run at the same time. All end if this one is interrupted. Raises an
    EnvironmentMismatchError if this machine cannot compile for a GPU without one.
    """
    problem = unusable()
    if importlib.util.find_spec("triton") is None:
        problem = "requires triton; run `pip install '.[gpu-compile]'` in the checkout"
    if problem is not None:
        raise EnvironmentMismatchError(f"compiling for a GPU without one {problem}")
    with ExitStack() as stack:
        started = []
        for arch, function in calls:
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            started.append(pool.submit(_call, arch, pickle.dumps(function)))
        try:
            return [future.result() for future in started]
        except KeyboardInterrupt:
            for process in active_children():
                process.kill()
            raise


def _call(arch: str, function: bytes) -> Any:
    # Errors are raised; what else torch and Triton print is about a device that there is not.
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    # Threads of the autograd engine may still run; an ordinary exit then calls std::terminate.
    atexit.register(os._exit, 0)
    load()
    from switchtitan.workbench.benchmark.gpu import torch_inside

    # Before the function's modules are imported, which keep functions of torch.
    torch_inside.install(arch)
    try:
        return pickle.loads(function)()
    except UserError:
        raise
    except Exception:
        # Not itself: it may hold what cannot be sent to the other process.
        raise RuntimeError(traceback.format_exc()) from None


def load() -> None:
    """Adds the device to the torch that this process imports later."""
    assert "torch" not in sys.modules, "torch looks for devices when it is imported"
    library = _build()
    # Loaded globally, since the library needs their symbols.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _build() -> Path:
    """The library for this source, torch and compiler, in the user's cache folder."""
    key = hashlib.sha256(
        _SOURCE.read_bytes() + f"{version('torch')} {_compiler()}".encode()
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchtitan"
    library = cache / f"fake_cuda-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "fake_cuda.so"
        command = [str(_compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", str(_SOURCE)]
        command += ["-o", str(built), f"-I{_TORCH / 'include'}"]
        command += [f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        # Other processes may build it at the same time.
        built.replace(library)
    return library
