"""Builds the library of `fake_cuda.cpp` once, and runs functions in processes that load it."""

import ctypes
import hashlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def compiler():
    """The C++ compiler, from $CXX or $PATH; None if not found."""
    return shutil.which(os.environ.get("CXX", "g++"))


def has_cuda_build():
    """Whether torch is built with CUDA, and so has a device of its own to register."""
    return (_torch_folder() / "lib" / "libtorch_cuda.so").exists()


def _torch_folder():
    """The folder of the package torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


needs_compiler = pytest.mark.skipif(
    compiler() is None or sys.platform != "linux" or has_cuda_build(),
    reason="fake CUDA requires Linux, a C++ compiler (g++ or $CXX) and a CPU build of torch",
)


def run_check(check, *arguments):
    """Returns `check(*arguments)`, called in a new process; arguments and result are JSON.

    Args:
        check: a function of an importable module.

    Raises:
        AssertionError: with its output, if the process fails.
    """
    words = [check.__module__, check.__qualname__, json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-m", __name__, *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def _load():
    """Adds a CUDA device that does nothing to the torch that this process imports later."""
    torch_folder = _torch_folder()
    library = _build(torch_folder)
    # Loaded globally, since the library needs their symbols.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _build(torch_folder):
    """The library for this source, torch and compiler, in the user's cache folder."""
    key = hashlib.sha256(
        _SOURCE.read_bytes() + f"{version('torch')} {compiler()}".encode()
    ).hexdigest()[:16]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = caches / "switchtitan" / "tests"
    library = cache / f"fake_cuda-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "fake_cuda.so"
        command = [str(compiler()), "-std=c++20", "-O0", "-shared", "-fPIC", str(_SOURCE)]
        command += ["-o", str(built), f"-I{torch_folder / 'include'}"]
        command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Tests in other processes may build it at the same time.
        built.replace(library)
    return library


def _main():
    _load()
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
