"""The dtype of activations and gradients: bf16 if the devices multiply it natively, else fp32."""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from switchtitan.distributed.world import World
from switchtitan.errors import EnvironmentMismatchError

logger = logging.getLogger(__name__)

DtypeName = Literal["bfloat16", "float32"]
"""A compute dtype, as in `torch.<name>`."""
DtypeKey = Literal["auto", "bfloat16", "float32"]
"""A value of `[training] dtype`."""


class Bf16Support(NamedTuple):
    """Whether a device multiplies bf16 natively."""

    is_native: bool
    evidence: str
    """A clause, e.g. "the CPU has AVX512-BF16"."""


@dataclass(frozen=True)
class ComputeDtype:
    """A run's compute dtype, and why it was chosen."""

    name: DtypeName
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bfloat16" else torch.float32

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_dtype(
    key: DtypeKey, supports: Sequence[Bf16Support], saved: DtypeName | None = None
) -> ComputeDtype:
    """Returns the compute dtype of a run.

    Args:
        key: `[training] dtype`. "auto" is bf16 if every rank multiplies it natively, else fp32.
        supports: of every rank's device.
        saved: compute dtype of the checkpoint that the run resumes from, which "auto" keeps.
    """
    if key != "auto":
        return ComputeDtype(key, "set by [training] dtype")
    if saved is not None:
        return ComputeDtype(saved, "as in the checkpoint")
    if emulating := [support.evidence for support in supports if not support.is_native]:
        return ComputeDtype("float32", f"bfloat16 is not native: {emulating[0]}")
    return ComputeDtype("bfloat16", f"native: {supports[0].evidence}")


def dtype_on(
    device: torch.device, key: DtypeKey, saved: DtypeName | None = None, world: World | None = None
) -> ComputeDtype:
    """Returns `choose_dtype` for a device, or for those of all ranks of `world`, the same on every
    rank; collective. Warns if this device emulates bf16. Raises an EnvironmentMismatchError on
    every rank of `world` if a GPU would emulate bf16, which Triton refuses."""
    own = bf16_support(device)
    supports = [own] if world is None else world.gather(own)
    chosen = choose_dtype(key, supports, saved)
    emulating = [support.evidence for support in supports if not support.is_native]
    if chosen.name == "bfloat16" and emulating:
        if world is not None and device.type == "cuda":
            raise EnvironmentMismatchError(gpu_problem(key, emulating[0]))
        if not own.is_native:
            logger.warning(
                "computing in bfloat16 (%s), but %s: products take several times as long as with "
                '[training] dtype = "float32"',
                chosen.reason,
                own.evidence,
            )
    return chosen


def gpu_problem(key: DtypeKey, evidence: str) -> str:
    """Returns the error message for bf16 on a GPU that emulates it."""
    return (
        f'[training] dtype = "{key}": bfloat16 is set, or the checkpoint\'s, but {evidence}; use '
        'other GPUs, or write dtype = "float32"'
    )


def bf16_support(device: torch.device) -> Bf16Support:
    """Tells whether a CPU or a GPU multiplies bf16 natively."""
    if device.type == "cuda":
        # As torch.cuda.is_bf16_supported, which asks the current device: since Ampere, and on AMD.
        is_amd = torch.version.hip is not None
        is_native = is_amd or torch.cuda.get_device_capability(device) >= (8, 0)
        claim = "multiplies" if is_native else "is older than Ampere and does not multiply"
        return Bf16Support(is_native, f"{torch.cuda.get_device_name(device)} {claim} bfloat16")
    # Private in torch 2.13; without it, fp32 is the safe choice.
    in_onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    if platform.machine() not in ("x86_64", "AMD64"):
        return Bf16Support(in_onednn, f"the CPU {'has' if in_onednn else 'lacks'} bfloat16")
    # oneDNN supports every CPU with AVX-512, but without AVX512-BF16 a product takes 2.7 times as
    # long as in fp32 (measured). CPUs with AMX have AVX512-BF16 too.
    is_native = in_onednn and torch.cpu._is_avx512_bf16_supported()
    return Bf16Support(is_native, f"the CPU {'has' if is_native else 'has no'} AVX512-BF16")
