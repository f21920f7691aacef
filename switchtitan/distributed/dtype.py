"""The dtype of activations and gradients: bf16 if the devices multiply it natively, else fp32."""

import logging
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from switchtitan.distributed.world import World
from switchtitan.errors import EnvironmentMismatchError

logger = logging.getLogger(__name__)

DtypeName = Literal["bfloat16", "float32"]
"""A compute dtype, as in `torch.<name>`."""
DtypeKey = Literal["auto", "bfloat16", "float32"]
"""A value of `[training] dtype`."""

_MIN_CAPABILITY = (8, 0)
"""CUDA compute capability of Ampere, the first with bf16 tensor cores."""
_AMD_WITH_MATRIX_BF16 = re.compile(r"gfx(908|90a|9[45]\w|1[1-9]\w\w)")
"""AMD's architectures with matrix instructions for bf16: CDNA from MI100 on, RDNA from 3 on; not
Vega, such as gfx906 and gfx90c, nor RDNA 1 and 2. Later ones than gfx12 are assumed to have them.
(gpuopen.com/learn/amd-lab-notes/amd-lab-notes-matrix-cores-readme,
gpuopen.com/learn/using_matrix_core_amd_rdna4)"""


@dataclass(frozen=True)
class Bf16Support:
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
        dtype: torch.dtype = getattr(torch, self.name)
        return dtype

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
    obstacle = find_emulation(supports)
    if obstacle is None:
        return ComputeDtype("bfloat16", f"native: {supports[0].evidence}")
    return ComputeDtype("float32", f"bfloat16 is not native: {obstacle}")


def find_emulation(supports: Sequence[Bf16Support]) -> str | None:
    """Returns which rank does not multiply bf16 natively, and why; None if all do."""
    for rank, support in enumerate(supports):
        if not support.is_native:
            return support.evidence if len(supports) == 1 else f"rank {rank}: {support.evidence}"
    return None


def dtype_on(device: torch.device, key: DtypeKey, saved: DtypeName | None = None) -> ComputeDtype:
    """Returns `choose_dtype` for one device; warns if it emulates bf16."""
    supports = [bf16_support(device)]
    chosen = choose_dtype(key, supports, saved)
    obstacle = find_emulation(supports)
    if chosen.name == "bfloat16" and obstacle is not None:
        _warn_of_emulation(chosen, obstacle)
    return chosen


def agree_on_dtype(key: DtypeKey, world: World, saved: DtypeName | None = None) -> ComputeDtype:
    """Returns `choose_dtype` for the devices of all ranks, the same on every rank; collective.

    Warns if CPUs emulate bf16.

    Raises:
        EnvironmentMismatchError: on every rank, if GPUs would emulate bf16.
    """
    supports: list[Bf16Support] = world.gather(bf16_support(world.device))
    chosen = choose_dtype(key, supports, saved)
    obstacle = find_emulation(supports)
    if chosen.name == "bfloat16" and obstacle is not None:
        if world.device.type == "cuda":
            raise EnvironmentMismatchError(gpu_problem(key, obstacle))
        if world.is_main:
            _warn_of_emulation(chosen, obstacle)
    return chosen


def gpu_problem(key: DtypeKey, obstacle: str) -> str:
    """Returns the error message for bf16 on a GPU that emulates it, which Triton does not compile.

    Args:
        obstacle: see `find_emulation`.
    """
    if key == "auto":
        return (
            f'[training] dtype = "auto": the checkpoint was trained in bfloat16, but {obstacle}; '
            'resume on other GPUs, or write dtype = "float32" to change the dtype'
        )
    return f'[training] dtype = "{key}": {obstacle}; write dtype = "auto" or "float32"'


def bf16_support(device: torch.device) -> Bf16Support:
    """Tells whether a CPU or a GPU multiplies bf16 natively."""
    if device.type == "cuda":
        return gpu_support(
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
            # torch.cuda.is_bf16_supported is true for every AMD GPU.
            amd_architecture=None
            if torch.version.hip is None
            else torch.cuda.get_device_properties(device).gcnArchName,
        )
    # Private in torch 2.13; without them, fp32 is the safe choice.
    in_onednn = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    has_avx512_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return cpu_support(
        platform.machine(),
        in_onednn=None if in_onednn is None else in_onednn(),
        has_avx512_bf16=has_avx512_bf16 is not None and has_avx512_bf16(),
    )


def gpu_support(
    name: str, capability: tuple[int, int], amd_architecture: str | None = None
) -> Bf16Support:
    """Decides for a GPU.

    Args:
        name: of the device.
        capability: CUDA compute capability; ignored for an AMD GPU.
        amd_architecture: `gcnArchName` of an AMD GPU, e.g. "gfx90a:sramecc+:xnack-".
    """
    if amd_architecture is not None:
        architecture = amd_architecture.partition(":")[0]
        is_native = _AMD_WITH_MATRIX_BF16.fullmatch(architecture) is not None
        claim = "has" if is_native else "has no"
        return Bf16Support(
            is_native, f"{name} ({architecture}) {claim} matrix instructions for bfloat16"
        )
    version = f"{name} has compute capability {capability[0]}.{capability[1]}"
    if capability >= _MIN_CAPABILITY:
        return Bf16Support(True, version)
    return Bf16Support(False, f"{version}, and bfloat16 needs 8.0 (Ampere) or later")


def cpu_support(machine: str, in_onednn: bool | None, has_avx512_bf16: bool) -> Bf16Support:
    """Decides for a CPU.

    Args:
        machine: architecture, e.g. "x86_64".
        in_onednn: whether torch's CPU library supports bf16; None if this torch cannot tell. On
            x86 it says so for every CPU with AVX-512, but without AVX512-BF16 a product takes 2.7
            times as long as in fp32 (measured). CPUs with AMX have AVX512-BF16 too.
        has_avx512_bf16: of the processor.
    """
    if in_onednn is None:
        return Bf16Support(False, "this build of torch does not tell whether the CPU supports it")
    if machine not in ("x86_64", "AMD64"):
        claim = "supports it" if in_onednn else "does not support it"
        return Bf16Support(in_onednn, f"the CPU ({machine}) {claim}")
    if not has_avx512_bf16:
        return Bf16Support(False, "the CPU has no AVX512-BF16")
    if not in_onednn:
        return Bf16Support(False, "oneDNN does not use the CPU's AVX512-BF16")
    return Bf16Support(True, "the CPU has AVX512-BF16")


def _warn_of_emulation(chosen: ComputeDtype, obstacle: str) -> None:
    logger.warning(
        "COMPUTING IN BFLOAT16 WITHOUT NATIVE SUPPORT (%s): %s. Products take several "
        'times as long as with [training] dtype = "float32"',
        chosen.reason,
        obstacle,
    )
