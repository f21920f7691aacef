"""Builds the library of `fake_cuda.cpp` once and loads it, before torch is imported."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def compiler() -> str | None:
    """The C++ compiler, from $CXX or $PATH; None if not found."""
    return shutil.which(os.environ.get("CXX", "g++"))


def has_cuda_build() -> bool:
    """Whether torch is built with CUDA, and so has a device of its own to register."""
    return (_torch_folder() / "lib" / "libtorch_cuda.so").exists()


def load() -> None:
    """Adds a CUDA device that does nothing to the torch that this process imports later."""
    torch_folder = _torch_folder()
    library = _build(torch_folder)
    # Loaded globally, since the library needs their symbols.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    """The folder of the package torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _build(torch_folder: Path) -> Path:
    """The library for this source, torch and compiler, in the user's cache folder."""
    key = hashlib.sha256(
        _SOURCE.read_bytes() + f"{version('torch')} {compiler()}".encode()
    ).hexdigest()[:16]
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "switchtitan" / "tests"
    )
    library = cache / f"fake_cuda-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / "fake_cuda.so"
        command = [
            *(
                str(compiler()),
                "-std=c++20",
                "-O0",
                "-shared",
                "-fPIC",
                str(_SOURCE),
                "-o",
                str(built),
            ),
            *(f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True)
        # Tests in other processes may build it at the same time.
        built.replace(library)
    return library
