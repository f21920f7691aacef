"""Every method, optimizer and model compiles for GPUs, on a machine without one; faults are found.

Triton kernels are compiled to machine code, and launches are counted; nothing runs on a GPU.
"""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.commands import run
from support.compiled_cuda import (
    CASES,
    NUM_BLOCKS,
    NUM_ROWS,
    PLANTS,
    WIDTH,
    record_cases,
    record_plants,
)

from switchtitan.distributed.gpus import CARDS
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.workbench.benchmark.gpu import device, torch_inside
from switchtitan.workbench.benchmark.gpu.record import Launch, StepOnGpu, bounds_s, num_bytes_of

REASON = device.unusable()
if importlib.util.find_spec("triton") is None:
    REASON = "requires triton"
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"compiling for a GPU {REASON}")

ARCHS = ("sm_80", "sm_90")
MOST_SHARED_BYTES = 99 * 1024
"""What a block may have on consumer cards of sm_86 and sm_89."""


class Limits(NamedTuple):
    launches: int
    """Of a block's compiled code, forward and backward."""
    megabytes: int
    """Read and written by them; 72 sequences of 512 tokens, hidden size 512."""
    all_launches: int
    """Of a step of two blocks."""


# Of the architecture with more, without slack: lower them with what a change saves. On sm_80 other
# contractions are faster.
LIMITS = {
    "full rank": Limits(41, 4811, 537),
    "recomputation": Limits(52, 5989, 559),
    "switchlora": Limits(66, 5147, 612),
    "lora": Limits(66, 5087, 647),
    "low rank": Limits(62, 5196, 730),
    "sltrain": Limits(447, 4696, 1349),
    "cola": Limits(76, 5526, 607),
    "qwen2": Limits(51, 4735, 558),
}


@pytest.fixture(scope="module")
def recorded():
    """Steps by architecture and case; steps with planted faults, and the bytes of a kernel."""
    calls = [*((arch, record_cases) for arch in ARCHS), ("sm_90", record_plants)]
    *cases, planted = device.call_with_gpus(calls)
    return dict(zip(ARCHS, cases, strict=True)), planted


@pytest.fixture(scope="module")
def found(recorded):
    return recorded[0]


@pytest.fixture(scope="module")
def planted(recorded):
    return recorded[1]


def late_compilations(step):
    return [function for functions in step.compiled[1:] for function in functions]


def spills(step):
    return {kernel.name: kernel.spilled_bytes for kernel in step.kernels if kernel.spilled_bytes}


def cost_of_blocks(step):
    """Launches of the compiled code of all blocks, and their bytes."""
    launches = [
        (launch, number)
        for launch, number in step.launches
        if launch.region in ("forward", "backward", "step") and launch.kind in ("triton", "extern")
    ]
    num_launches = sum(number * launch.num_launches for launch, number in launches)
    return num_launches, sum(number * launch.num_bytes for launch, number in launches)


def measured(step):
    num_launches, num_bytes = cost_of_blocks(step)
    return Limits(
        -(-num_launches // NUM_BLOCKS),
        -(-num_bytes // (NUM_BLOCKS * 10**6)),
        sum(number * launch.num_launches for launch, number in step.launches),
    )


def beyond(step, limits):
    found = measured(step)._asdict()
    return {key: value for key, value in found.items() if value > getattr(limits, key)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_compiles_once_without_breaks_and_spills(found, arch, name):
    step = found[arch][name]
    assert late_compilations(step) == []
    assert step.compiled[0]
    assert step.kernels
    assert spills(step) == {}
    assert [k for k in step.kernels if k.shared_bytes > MOST_SHARED_BYTES] == []


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_block_launches_and_moves_at_most(found, arch, name):
    assert beyond(found[arch][name], LIMITS[name]) == {}
    assert all(measured(found[arch][name]))


@pytest.mark.parametrize("arch", ARCHS)
def test_attention_and_the_last_norm_are_the_kernels_that_a_gpu_chooses(found, arch):
    counts = {}
    for launch, number in found[arch]["full rank"].launches:
        counts[launch.name] = counts.get(launch.name, 0) + number
    assert counts["_scaled_dot_product_flash_attention"] == NUM_BLOCKS
    assert counts["_scaled_dot_product_flash_attention_backward"] == NUM_BLOCKS
    # Those of blocks are compiled.
    assert counts["_fused_rms_norm"] == counts["_fused_rms_norm_backward"] == 1
    assert not {"bmm", "_softmax", "mean"} & counts.keys()


def test_planted_faults_are_found(found, planted):
    right, plants = found["sm_90"]["full rank"], planted[0]
    assert plants.keys() == PLANTS.keys()
    copying, spilling, recompiling = plants.values()
    num_copied = 2 * 2 * 72 * 512 * 512  # q is read and written, in bf16
    assert cost_of_blocks(copying)[1] >= cost_of_blocks(right)[1] + NUM_BLOCKS * num_copied
    assert beyond(copying, LIMITS["full rank"]).keys() == set(Limits._fields)
    assert spills(spilling)
    assert late_compilations(recompiling)


def test_of_strided_rows_only_the_parts_that_are_read_count(planted):
    # Two parts are read and one is written, in bf16; Inductor would count all of the rows.
    assert planted[1] == 2 * 3 * NUM_ROWS * WIDTH


def test_a_torch_that_moved_a_private_part_is_refused(monkeypatch):
    monkeypatch.delattr("torch._subclasses.fake_tensor.DataDependentOutputException")
    with pytest.raises(EnvironmentMismatchError, match=r"DataDependentOutput.*torch 2\.13"):
        torch_inside.value_error()


aten = torch.ops.aten
A, B, ROW, SUM = torch.ones(4, 6), torch.ones(6, 5), torch.ones(5), torch.ones(4, 5)


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "result", "read_and_written"),
    [
        (aten.mm.default, (A, B), {}, SUM, [A, B, SUM]),
        (aten.addmm.default, (ROW, A, B), {}, SUM, [ROW, A, B, SUM]),
        # Copied first, and then overwritten.
        (aten.addmm.default, (SUM, A, B), {}, SUM.clone(), [A, B, *4 * [SUM]]),
        (aten.addmm.default, (SUM, A, B), {"beta": 0}, SUM.clone(), [A, B, SUM]),
        (aten.addmm.out, (SUM, A, B), {"out": SUM}, SUM, [A, B, SUM, SUM]),
        (aten.addmm_.default, (SUM, A, B), {}, SUM, [A, B, SUM, SUM]),
        (aten.add.Tensor, (A, A), {}, A.clone(), [A, A]),
        (aten.mul_.Tensor, (A, 2.0), {}, A, [A, A]),
        (aten._foreach_add_.Scalar, ([A, B], 1.0), {}, None, [A, B, A, B]),
        # Weights and moments are overwritten, gradients are not.
        (
            aten._fused_adamw_.default,
            ([A], [B], [SUM], [ROW], [], []),
            {},
            None,
            [A, B, SUM, ROW, A, SUM, ROW],
        ),
        (aten.copy_.default, (A, B), {}, A, [A, B]),
        (aten.zero_.default, (A,), {}, A, [A]),
    ],
)
def test_bytes_are_read_and_written(function, args, kwargs, result, read_and_written):
    name = function.name().partition("::")[2].split(".")[0]
    found = num_bytes_of(name, function, args, kwargs, result)
    assert found == sum(tensor.nbytes for tensor in read_and_written)


def test_a_launch_takes_its_bytes_or_its_operations_and_a_collective_nothing():
    bandwidth, flops_per_s = 3.35e12, 989.5e12  # of an H100
    launches = [
        (Launch("forward", "triton", "copy", 1, int(bandwidth), 0, ""), 2),
        (Launch("forward", "extern", "mm", 1, 10, int(4 * flops_per_s), "bfloat16"), 1),
        (Launch("forward", "collective", "all_reduce_", 1, int(bandwidth), 0, ""), 9),
    ]
    step = StepOnGpu(launches, [])
    bounds = bounds_s({"sm_90": step})
    assert bounds["H100 SXM"] == pytest.approx(2 + 4)
    # Other cards run other code.
    assert bounds.keys() == {name for name, card in CARDS.items() if card.arch == "sm_90"}


def test_the_command_compares_configurations(tmp_path):
    sides = "llama_60m.toml:model.num_layers=1", "llama_60m.toml:model.num_layers=2"
    eager = [f"--compile.{key}=false" for key in ("blocks", "loss", "optimizer")]
    keys = ["--training.global_batch_size=144", *eager]
    file = tmp_path / "record.json"
    outcome = run("benchmark", "gpu", *sides, "--num-ranks", 2, "--json", file, *keys)
    assert outcome.status == 0, outcome.errors
    steps = json.loads(file.read_text())["steps"]
    one, two = (steps[side] for side in sides)
    assert one["bounds_s"]["H200"] < one["bounds_s"]["H100 SXM"] < two["bounds_s"]["H100 SXM"]
    collectives = [launch for launch in one["sm_90"]["launches"] if launch["kind"] == "collective"]
    assert collectives


def test_without_triton_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    outcome = run("benchmark", "gpu", "llama_60m.toml")
    outcome.check_refused("triton", ".[gpu-compile]")


def test_sigterm_ends_the_processes_that_compile():
    sides = ["llama_60m.toml"] * 10  # take minutes
    words = [sys.executable, "-m", "switchtitan", "benchmark", "gpu", *sides]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as command:
        started = Path(f"/proc/{command.pid}/task/{command.pid}/children")
        while not (children := compiling(started.read_text().split())):
            assert command.poll() is None
            time.sleep(0.1)
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
    assert compiling(children) == []


def compiling(processes):
    """Those of some processes that compile for a GPU."""
    commands = {process: Path(f"/proc/{process}/cmdline") for process in processes}
    return [
        process
        for process, command in commands.items()
        if command.exists() and "--multiprocessing-fork" in command.read_text().split("\0")
    ]
