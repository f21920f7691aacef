"""Which dtype computes, in which precision updates multiply, and how bf16 is rounded."""

import math
import platform
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.nonfinite import NOT_FINITE
from support.tiny import tiny_trainer, train_steps

from switchtitan.distributed import dtype as compute_dtype
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import (
    Bf16Support,
    ComputeDtype,
    bf16_support,
    choose_dtype,
    dtype_on,
)
from switchtitan.distributed.precision import allow_tf32, full_precision, use_full_precision
from switchtitan.distributed.world import start_world
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.numerics.fixed_point import random_words
from switchtitan.numerics.split_float import round_to_bf16
from switchtitan.workbench.benchmark.counters import CountingMode

NATIVE = Bf16Support(True, "it multiplies bf16")
EMULATED = Bf16Support(False, "it lacks bf16")
MATMUL = torch.backends.cuda.matmul


# The compute dtype.
@pytest.mark.parametrize(
    ("machine", "in_onednn", "has_avx512_bf16", "is_native"),
    [
        ("x86_64", True, True, True),
        # AVX-512 without AVX512-BF16: oneDNN converts to fp32 and back.
        ("AMD64", True, False, False),
        # ONEDNN_MAX_CPU_ISA=AVX2
        ("x86_64", False, True, False),
        ("aarch64", True, False, True),
        # A torch without oneDNN, or whose private function has another name.
        ("arm64", None, False, False),
    ],
)
def test_a_cpu_needs_bf16_instructions_that_torch_uses(
    monkeypatch, machine, in_onednn, has_avx512_bf16, is_native
):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    operations = {} if in_onednn is None else {"_is_mkldnn_bf16_supported": lambda: in_onednn}
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operations))
    assert bf16_support(torch.device("cpu")).is_native == is_native


@pytest.mark.parametrize(
    ("capability", "is_native"), [((8, 0), True), ((9, 0), True), ((7, 5), False)]
)
def test_a_gpu_needs_ampere(monkeypatch, capability, is_native):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    support = bf16_support(torch.device("cuda", 0))
    assert support.is_native == is_native
    assert "a card" in support.evidence


@pytest.mark.parametrize(
    ("key", "supports", "saved", "name", "reason"),
    [
        ("auto", [NATIVE], None, "bfloat16", "it multiplies bf16"),
        ("auto", [EMULATED], None, "float32", "it lacks bf16"),
        ("auto", [NATIVE, NATIVE, EMULATED], None, "float32", "it lacks bf16"),
        ("auto", [NATIVE], "float32", "float32", "checkpoint"),
        ("auto", [EMULATED], "bfloat16", "bfloat16", "checkpoint"),
        ("float32", [NATIVE], "bfloat16", "float32", "[training] dtype"),
        ("bfloat16", [EMULATED], None, "bfloat16", "[training] dtype"),
    ],
)
def test_the_key_comes_before_the_checkpoint_and_that_before_the_devices(
    key, supports, saved, name, reason
):
    chosen = choose_dtype(key, supports, saved)
    assert chosen == ComputeDtype(name, chosen.reason)
    assert reason in chosen.reason
    assert chosen.dtype == getattr(torch, name)


def test_emulation_is_a_warning_on_a_cpu_and_an_error_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(compute_dtype, "bf16_support", lambda device: EMULATED)
    world = start_world(ParallelismConfig())
    with caplog.at_level("WARNING", logger="switchtitan"):
        assert dtype_on(world.device, "auto", world=world).name == "float32"
        assert caplog.text == ""
        assert dtype_on(world.device, "auto", "bfloat16", world).name == "bfloat16"
    assert "it lacks bf16" in caplog.text
    on_gpu = replace(world, device=torch.device("cuda", 0))  # nothing is computed on it
    for key, saved in (("bfloat16", None), ("auto", "bfloat16")):
        with pytest.raises(EnvironmentMismatchError, match=r"\[training\] dtype = .*it lacks bf16"):
            dtype_on(on_gpu.device, key, saved, on_gpu)
    assert dtype_on(on_gpu.device, "auto", world=on_gpu).name == "float32"


# The precision of products.
@pytest.fixture
def precision(monkeypatch):
    """Restores what precision functions set."""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    yield monkeypatch
    monkeypatch.undo()
    use_full_precision("cpu")


def test_everything_that_rounds_is_switched_off(precision):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    MATMUL.allow_bf16_reduced_precision_reduction = True
    MATMUL.allow_fp16_reduced_precision_reduction = True
    use_full_precision("cuda")
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32
    assert not MATMUL.allow_bf16_reduced_precision_reduction
    assert not MATMUL.allow_fp16_reduced_precision_reduction


def test_a_variable_that_torch_cannot_override_is_refused_on_a_gpu(precision):
    precision.setenv("NVIDIA_TF32_OVERRIDE", "0")
    use_full_precision("cuda")
    precision.setenv("NVIDIA_TF32_OVERRIDE", "1")
    use_full_precision("cpu")
    with pytest.raises(EnvironmentMismatchError, match="NVIDIA_TF32_OVERRIDE=1"):
        use_full_precision("cuda")


def test_full_precision_restores_what_was_set_outside(precision):
    allow_tf32()
    with full_precision():
        with full_precision():
            pass
        assert not MATMUL.allow_tf32
    assert MATMUL.allow_tf32
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert MATMUL.allow_tf32


def test_full_precision_restores_what_was_set_in_torch_s_newer_way(precision):
    """As `TrainingArguments(tf32=True)` of transformers does it, before and after."""
    for _ in range(2):
        MATMUL.fp32_precision = "tf32"
        with full_precision():
            assert MATMUL.fp32_precision == "ieee"
        assert MATMUL.fp32_precision == "tf32"
        MATMUL.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


class RecordProducts(CountingMode):
    """The precision that is set at each product of matrices."""

    def __init__(self):
        super().__init__()
        self.precisions = []

    def count(self, func, args, kwargs, result):
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            self.precisions.append(torch.get_float32_matmul_precision())


@pytest.mark.parametrize("method", ["switchlora", "relora", "galore", "fira", "apollo"])
def test_updates_multiply_in_fp32_while_training_uses_tf32(corpora, precision, method):
    resets = ("--method.reset_interval", "2", "--method.restart_warmup_steps", "1")
    keys, num_before = (resets, 1) if method == "relora" else ((), 0)
    trainer = tiny_trainer(corpora / f"precision-{method}", method, *keys)
    stepper = trainer.stepper
    allow_tf32()
    train_steps(trainer, num_before)
    with RecordProducts() as gradients:
        stepper.compute_gradients()
    assert set(gradients.precisions) == {"high"}
    with RecordProducts() as updates:
        stepper.update()
    stepper.close()
    assert len(updates.precisions) > 10
    assert set(updates.precisions) == {"highest"}


def test_rank_telemetry_merges_in_fp32_while_training_uses_tf32(corpora, precision):
    keys = ("--spectrum.interval", "1", "--training.steps", "1")
    trainer = tiny_trainer(corpora / "precision-telemetry", "switchlora", *keys)
    allow_tf32()
    train_steps(trainer, 1)
    (telemetry,) = trainer.hooks
    with RecordProducts() as merges:
        telemetry.after(1, trainer.reporter)
    trainer.close()
    # B A and a Gram matrix of each of seven layers in two blocks.
    assert merges.precisions == ["highest"] * (2 * 7 * 2)
    assert MATMUL.allow_tf32


# Stochastic rounding.
@pytest.mark.parametrize(
    "value", [1.0 + 2**-9, -0.3, 1e-3, -7.7e5, 3.1e38, 2.0**-129 + 2.0**-140, 0.0, -2.5]
)
def test_over_all_bits_the_mean_is_exact_and_only_neighbours_come_up(value):
    values = torch.full((2**16,), value)
    rounded = round_to_bf16(values, torch.arange(2**16, dtype=torch.int32))
    assert rounded.dtype == torch.bfloat16
    # fp64 holds the sum of so many bf16 values of like size.
    assert rounded.double().mean() == values[0].double()
    exact = values[0].double().abs()
    seen = rounded.double().abs().unique()
    assert len(seen) == (1 if exact == exact.bfloat16().double() else 2)
    assert seen[0] <= exact <= seen[-1]
    if len(seen) == 2:
        between = torch.nextafter(seen[0].bfloat16(), torch.tensor(math.inf, dtype=torch.bfloat16))
        assert between.double() == seen[1]


@pytest.mark.parametrize("bits", [0, 1, 2**15, 2**16 - 1])
def test_what_is_not_finite_stays_so(bits):
    rounded = round_to_bf16(NOT_FINITE, torch.full((5,), bits, dtype=torch.int32))
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    assert rounded[2:].isnan().all()


def test_bits_are_uniform_and_independent_of_their_neighbours():
    key, other_key = torch.tensor([12345, 12346], dtype=torch.int32)
    words = random_words(key, 0, 512, 1024)
    assert torch.equal(random_words(key, 4, 3, 1024), words[4:7])
    assert words.dtype == torch.int32
    bits, more = words & 0xFFFF, (words >> 16) & 0xFFFF
    other = random_words(other_key, 0, 512, 1024) & 0xFFFF
    pairs = {
        "halves": (bits, bits % 256),
        "rows": (bits[1:], bits[:-1] >> 8),
        "columns": (bits[:, 1:], bits[:, :-1] >> 8),
        "second columns": (bits[:, 2:], bits[:, :-2] >> 8),
        "diagonals": (bits[1:, 1:], bits[:-1, :-1] >> 8),
        "events": (bits, other >> 8),
        "words": (bits, more >> 8),
    }
    for name, (first, second) in pairs.items():
        counts = torch.bincount(((first >> 8) * 256 + second).flatten(), minlength=2**16).double()
        # Some 2^16 degrees of freedom: the deviation is 0.0055; five of them.
        chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
        assert chi_square / (counts.numel() - 1) == pytest.approx(1, abs=0.028), name
    for part in range(16):
        ones = ((bits >> part) & 1).double().mean().item()
        assert ones == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(bits.numel())), part
