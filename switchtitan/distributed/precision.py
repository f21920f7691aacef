"""The precision of products of fp32 matrices, and deterministic algorithms.

What torch does by default depends on the environment: containers set variables that round factors
of fp32 products to TF32, with 10 bits of the significand. Folding factors into weights, merging and
projecting gradients need all 23.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from switchtitan.errors import EnvironmentMismatchError

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""The values with which cuBLAS is deterministic, by torch's documentation."""


def use_full_precision(device_type: str) -> None:
    """Makes torch multiply fp32 matrices in fp32, and add up products of bf16 and fp16 in fp32.

    Overrides TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which torch reads when it is imported.

    Raises:
        EnvironmentMismatchError: if a variable that cuBLAS itself reads demands TF32.
    """
    override = os.environ.get("NVIDIA_TF32_OVERRIDE", "0")
    if device_type == "cuda" and override != "0":
        raise EnvironmentMismatchError(
            f"NVIDIA_TF32_OVERRIDE={override}: NVIDIA's libraries would round fp32 products to "
            "TF32 wherever torch asks for fp32, also when factors are folded into weights; unset "
            "it, and for TF32 in training's products set [training] tf32 = true"
        )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


def allow_tf32() -> None:
    """Lets CUDA round the factors of fp32 products to TF32, except under `full_precision`."""
    torch.set_float32_matmul_precision("high")


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiplies fp32 matrices in fp32, whatever is set outside."""
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(outside)


def use_deterministic_algorithms() -> None:
    """Makes torch choose deterministic algorithms; an operation without one raises a RuntimeError.

    Call before the first product on CUDA.

    Raises:
        EnvironmentMismatchError: if the environment asks cuBLAS for something else.
    """
    workspace = os.environ.setdefault(_CUBLAS_WORKSPACE, _DETERMINISTIC_WORKSPACES[0])
    if workspace not in _DETERMINISTIC_WORKSPACES:
        raise EnvironmentMismatchError(
            f"{_CUBLAS_WORKSPACE}={workspace}: [training] deterministic = true needs "
            f"{' or '.join(_DETERMINISTIC_WORKSPACES)}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Otherwise every `torch.empty` is filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
