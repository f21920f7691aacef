"""The compute dtype follows what the devices say, the key and the checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.ranks import run_on_ranks

from switchtitan.distributed import compute_dtype
from switchtitan.distributed.compute_dtype import (
    Bf16Support,
    ComputeDtype,
    agree_on_dtype,
    bf16_support,
    choose_dtype,
    cpu_support,
    gpu_support,
)
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import start_world
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.job.checks import check_dtype
from switchtitan.job.sections import TrainingConfig

NATIVE = Bf16Support(True, "it multiplies bf16")
EMULATED = Bf16Support(False, "it lacks bf16")


@pytest.mark.parametrize(
    ("machine", "in_onednn", "has_avx512_bf16", "is_native", "evidence"),
    [
        ("x86_64", True, True, True, "the CPU has AVX512-BF16"),
        ("AMD64", True, True, True, "the CPU has AVX512-BF16"),
        # AVX-512 without AVX512-BF16: oneDNN converts to fp32 and back.
        ("x86_64", True, False, False, "the CPU has no AVX512-BF16"),
        ("x86_64", False, False, False, "the CPU has no AVX512-BF16"),
        # ONEDNN_MAX_CPU_ISA=AVX2
        ("x86_64", False, True, False, "oneDNN does not use the CPU's AVX512-BF16"),
        ("aarch64", True, False, True, "the CPU (aarch64) supports it"),
        ("aarch64", False, False, False, "the CPU (aarch64) does not support it"),
        # A torch without oneDNN, or whose private function has another name.
        ("x86_64", None, True, False, "this build of torch does not tell"),
        ("arm64", None, False, False, "this build of torch does not tell"),
    ],
)
def test_a_cpu_needs_bf16_instructions_that_torch_uses(
    machine: str, in_onednn: bool | None, has_avx512_bf16: bool, is_native: bool, evidence: str
) -> None:
    support = cpu_support(machine, in_onednn, has_avx512_bf16)
    assert support.is_native == is_native
    assert evidence in support.evidence


@pytest.mark.parametrize(
    ("name", "capability", "is_native"),
    [
        ("NVIDIA H100", (9, 0), True),
        ("NVIDIA A100", (8, 0), True),
        ("NVIDIA B200", (10, 0), True),
        ("Tesla T4", (7, 5), False),
        ("Tesla V100", (7, 0), False),
    ],
)
def test_a_gpu_of_nvidia_needs_ampere(
    name: str, capability: tuple[int, int], is_native: bool
) -> None:
    support = gpu_support(name, capability)
    assert support.is_native == is_native
    assert name in support.evidence


AMD_GPUS = {
    "gfx906:sramecc+:xnack-": ("AMD Instinct MI50", False),
    "gfx908:sramecc+:xnack-": ("AMD Instinct MI100", True),
    "gfx90a:sramecc+:xnack-": ("AMD Instinct MI210", True),
    "gfx90c:xnack-": ("AMD Radeon Vega 8 Graphics", False),
    "gfx942:sramecc+:xnack-": ("AMD Instinct MI300X", True),
    "gfx950:sramecc+:xnack-": ("AMD Instinct MI355X", True),
    "gfx1010": ("AMD Radeon RX 5700", False),
    "gfx1030": ("AMD Radeon RX 6800", False),
    "gfx1100": ("AMD Radeon RX 7900 XTX", True),
    "gfx1151": ("AMD Radeon 8060S Graphics", True),
    "gfx1201": ("AMD Radeon RX 9070 XT", True),
}


@pytest.mark.parametrize("architecture", AMD_GPUS)
def test_a_gpu_of_amd_needs_matrix_instructions(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, is_native = AMD_GPUS[architecture]
    device = torch.device("cuda", 0)
    # What torch for ROCm says of such a GPU: a capability that looks like NVIDIA's.
    properties = SimpleNamespace(gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    support = bf16_support(device)
    claim = "has" if is_native else "has no"
    short = architecture.partition(":")[0]
    assert support == Bf16Support(
        is_native, f"{name} ({short}) {claim} matrix instructions for bfloat16"
    )


def test_this_cpu_is_asked_without_an_error() -> None:
    support = bf16_support(torch.device("cpu"))
    assert support.evidence
    if support.is_native:
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(
    ("key", "supports", "saved", "expected"),
    [
        ("auto", [NATIVE], None, ComputeDtype("bfloat16", "native: it multiplies bf16")),
        (
            "auto",
            [EMULATED],
            None,
            ComputeDtype("float32", "bfloat16 is not native: it lacks bf16"),
        ),
        (
            "auto",
            [NATIVE, NATIVE, EMULATED],
            None,
            ComputeDtype("float32", "bfloat16 is not native: rank 2: it lacks bf16"),
        ),
        ("auto", [NATIVE], "float32", ComputeDtype("float32", "as in the checkpoint")),
        ("auto", [EMULATED], "bfloat16", ComputeDtype("bfloat16", "as in the checkpoint")),
        ("float32", [NATIVE], "bfloat16", ComputeDtype("float32", "set by [training] dtype")),
        ("bfloat16", [EMULATED], None, ComputeDtype("bfloat16", "set by [training] dtype")),
    ],
)
def test_the_key_comes_before_the_checkpoint_and_that_before_the_devices(
    key, supports, saved, expected
) -> None:
    chosen = choose_dtype(key, supports, saved)
    assert chosen == expected
    assert chosen.dtype == getattr(torch, chosen.name)
    assert str(chosen) == f"{expected.name} ({expected.reason})"


@pytest.mark.parametrize(
    ("key", "support", "device", "is_refused"),
    [
        ("bfloat16", EMULATED, "cuda", True),
        ("bfloat16", NATIVE, "cuda", False),
        ("bfloat16", EMULATED, "cpu", False),
        ("auto", EMULATED, "cuda", False),
        ("float32", EMULATED, "cuda", False),
    ],
)
def test_only_bf16_on_a_gpu_without_it_is_refused(key, support, device, is_refused) -> None:
    training = TrainingConfig(steps=1, global_batch_size=1, local_batch_size=1, dtype=key)
    expected = '[training] dtype = "bfloat16": it lacks bf16; write dtype = "auto" or "float32"'
    assert check_dtype(training, support, device) == ([expected] if is_refused else [])


def test_a_checkpoint_in_bf16_is_not_resumed_by_a_gpu_without_it() -> None:
    message = compute_dtype.gpu_problem("auto", "it lacks bf16")
    assert "the checkpoint was trained in bfloat16, but it lacks bf16" in message
    assert 'write dtype = "float32"' in message


def test_emulation_on_a_cpu_is_a_warning(monkeypatch, caplog) -> None:
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: EMULATED)
    world = start_world(ParallelismConfig())
    with caplog.at_level("WARNING"):
        assert agree_on_dtype("auto", world).name == "float32"
        assert caplog.text == ""
        assert agree_on_dtype("auto", world, saved="bfloat16").name == "bfloat16"
    assert "WITHOUT NATIVE SUPPORT (as in the checkpoint): it lacks bf16" in caplog.text
    assert '[training] dtype = "float32"' in caplog.text


def test_emulation_on_a_gpu_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: EMULATED)
    world = start_world(ParallelismConfig())
    on_gpu = replace(world, device=torch.device("cuda", 0))  # nothing is computed on it
    for key, saved in (("bfloat16", None), ("auto", "bfloat16")):
        with pytest.raises(EnvironmentMismatchError, match=r"\[training\] dtype = .*it lacks bf16"):
            agree_on_dtype(key, on_gpu, saved)
    assert agree_on_dtype("auto", on_gpu).name == "float32"


def check_mixed_ranks(rank: int) -> None:
    compute_dtype.bf16_support = lambda device: EMULATED if rank == 1 else NATIVE
    world = start_world(ParallelismConfig())
    assert str(agree_on_dtype("auto", world)) == (
        "float32 (bfloat16 is not native: rank 1: it lacks bf16)"
    )
    compute_dtype.bf16_support = lambda device: NATIVE
    assert agree_on_dtype("auto", world).name == "bfloat16"


def test_ranks_of_mixed_hardware_agree() -> None:
    run_on_ranks(2, check_mixed_ranks)
