"""The precision of products of fp32 matrices, and deterministic algorithms.

Folding factors into weights, merging and projecting gradients need all 23 bits of the significand;
TF32 has 10. (Not in `dtype`, which imports `world`, which imports this.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from switchtitan.errors import EnvironmentMismatchError

_BACKENDS: tuple[Any, Any] = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
"""What multiplies matrices on GPUs and on CPUs."""


def use_full_precision(device_type: str) -> None:
    """Makes torch multiply fp32 matrices in fp32, and add up products of bf16 and fp16 in fp32.

    Overrides TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which containers set. Raises an
    EnvironmentMismatchError if a variable that cuBLAS itself reads demands TF32.
    """
    override = os.environ.get("NVIDIA_TF32_OVERRIDE", "0")
    if device_type == "cuda" and override != "0":
        raise EnvironmentMismatchError(
            f"NVIDIA_TF32_OVERRIDE={override}: fp32 products would be rounded to TF32 where "
            "factors are folded into weights; unset it, and set [training] tf32 = true instead"
        )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def allow_tf32() -> None:
    """Lets CUDA round the factors of fp32 products to TF32, except under `full_precision`."""
    torch.set_float32_matmul_precision("high")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies fp32 matrices in fp32, whatever is set outside, in torch's older or newer way."""
    newer, older = [backend.fp32_precision for backend in _BACKENDS], None
    with suppress(RuntimeError):  # only the newer way was taken
        older = torch.get_float32_matmul_precision()
    _set_precisions(older and "highest", ["ieee"] * len(newer))
    try:
        yield
    finally:
        _set_precisions(older, newer)


def _set_precisions(older: str | None, newer: list[str]) -> None:
    if older is not None:
        torch.set_float32_matmul_precision(older)
    for backend, precision in zip(_BACKENDS, newer, strict=True):
        backend.fp32_precision = precision


def use_deterministic_algorithms() -> None:
    """Makes torch choose deterministic algorithms; an operation without one raises a RuntimeError.

    Call before the first product on CUDA.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses most other values
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Otherwise every `torch.empty` is filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
