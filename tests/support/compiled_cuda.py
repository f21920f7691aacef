"""Compiled steps for a GPU without one: every method, optimizer and model, and planted faults.

Its functions run in a process of `call_with_gpus`.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import tomli
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from support.tiny import METHOD_KEYS, MINI
from switchtitan.job.config import JobConfig, parse_unchecked
from switchtitan.methods.operations import copy_in_backward
from switchtitan.models.llama.model import MLP, Attention
from switchtitan.optim import OPTIMIZERS
from switchtitan.training.step import Stepper
from switchtitan.workbench.benchmark.gpu import torch_inside
from switchtitan.workbench.benchmark.gpu.record import Launch, RecordLaunches, record_step

NUM_BLOCKS = 2
NUM_ROWS, WIDTH = 4096, 320
_BASE = {"model.num_layers": NUM_BLOCKS, "training.global_batch_size": 72, "compile.loss": "false"}
_EAGER_BLOCKS = "compile.blocks=false"
CASES = {
    "full rank": "",
    # Only here: its kernels would count as those of blocks.
    "loss": f"compile.loss=true {_EAGER_BLOCKS}",
    "recomputation": "activation_checkpoint.mode=full",
    "switchlora": "method.name=switchlora method.rank=128",
    "lora": "method.name=lora method.rank=64 optimizer.name=muon",
    "low rank": "method.name=low_rank method.rank=128 optimizer.name=scale",
    "relora": "method.name=relora method.rank=64 method.reset_interval=5000",
    # The blocks of these are those of full rank.
    "galore": f"method.name=galore method.rank=128 {_EAGER_BLOCKS}",
    "fira": f"method.name=fira method.rank=128 {_EAGER_BLOCKS}",
    "apollo": f"method.name=apollo method.rank=128 {_EAGER_BLOCKS}",
    "sltrain": "method.name=sltrain method.rank=128",
    "cola": "model.name=cola model.size=60m model.rank=128",
    "qwen2": "model.name=qwen2 model.size=60m model.num_kv_heads=2 optimizer.name=sgd",
    # Compiles the update of each shape; these are three.
    "adamw8bit": f"optimizer.name=adamw8bit model.intermediate_size=512 {_EAGER_BLOCKS}",
}
"""Name -> keys that differ from full rank."""
_named = {pair.partition("=")[2] for case in CASES.values() for pair in case.split()}
# Rows that are new need nothing here. torch's Adafactor reads norms on the host, which fake tensors
# do not have.
for _method in {method.removesuffix(MINI) for method in METHOD_KEYS} - {*_named, "full_rank"}:
    _keys = {"name": _method} | tomli.loads(METHOD_KEYS[_method])
    CASES[_method] = " ".join(f"method.{key}={value}" for key, value in _keys.items())
for _name in set(OPTIMIZERS) - {*_named, "adamw", "adafactor"}:
    CASES[_name] = f"optimizer.name={_name}"


def config_of(name: str) -> JobConfig:
    keys = _BASE | dict(pair.split("=") for pair in CASES[name].split())
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return parse_unchecked(["--config", "llama_60m.toml", *words])


class Kernel(NamedTuple):
    """A Triton kernel; the most of all configurations among which a GPU chooses by time."""

    name: str
    spilled_bytes: int
    """Of stack and local memory per thread."""
    shared_bytes: int
    """Per block."""


class Recorded(NamedTuple):
    """A `StepOnGpu`, with all Triton kernels of its configuration."""

    launches: list[tuple[Launch, int]]
    compiled: list[list[str]]
    kernels: list[Kernel]


def record(name: str) -> Recorded:
    step = record_step(config_of(name))
    kernels = []
    for tuner in dict.fromkeys(torch_inside.tuners):
        resources = [_resources(compiled) for compiled in tuner.compile_results]
        largest = (max(column) for column in zip(*resources, strict=True))
        kernels.append(Kernel(tuner.inductor_meta["kernel_name"], *largest))
    return Recorded(*step, kernels)


def _resources(compiled: Any) -> tuple[int, int]:
    """Returns spilled bytes and shared bytes of a compiled configuration."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    spilled = max(int(value) for value in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    return spilled, compiled.kernel.metadata.shared


def record_cases() -> dict[str, Recorded]:
    return {name: record(name) for name in CASES}


def bytes_of_parts() -> int:
    """Returns the bytes of a kernel that multiplies two parts of rows, of three."""
    record = RecordLaunches()
    with FakeTensorMode():
        rows = torch.empty(NUM_ROWS, 3 * WIDTH, dtype=torch.bfloat16, device="cuda")
        multiply = torch.compile(lambda x: F.silu(x[:, :WIDTH]) * x[:, WIDTH : 2 * WIDTH])
        with record:
            multiply(rows)
    ((launch, number),) = record.launches.items()
    assert launch.kind == "triton"
    return number * launch.num_bytes


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return copy_in_backward(x, x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def with_second_copy_of_q() -> Recorded:
    """A step of full rank in which each block copies q once more."""
    project = Attention.forward

    def forward(self, hidden, positions):
        with_copy = lambda query, *others: attend(_Copy.apply(query), *others)  # noqa: E731
        attend, self.attend = self.attend, with_copy
        try:
            return project(self, hidden, positions)
        finally:
            self.attend = attend

    with patch.object(Attention, "forward", forward):
        return record("full rank")


def with_few_registers() -> Recorded:
    """A step of full rank whose kernels may use 24 registers per thread, and must spill."""
    from triton.backends.nvidia.compiler import CUDABackend

    parse = CUDABackend.parse_options

    def parse_with_limit(backend, options):
        return parse(backend, {**options, "maxnreg": 24})

    with patch.object(CUDABackend, "parse_options", parse_with_limit):
        return record("full rank")


def with_a_number_per_step() -> Recorded:
    """A step of full rank whose blocks multiply by a Python number that every step changes."""
    multiply, take_step = MLP.forward, Stepper.step

    def forward(self, hidden):
        return multiply(self, hidden) * MLP.factor

    def step(self):
        MLP.factor += 1
        return take_step(self)

    with (
        patch.object(MLP, "factor", 1, create=True),
        patch.object(MLP, "forward", forward),
        patch.object(Stepper, "step", step),
    ):
        return record("full rank")


PLANTS = {
    plant.__name__: plant
    for plant in (with_second_copy_of_q, with_few_registers, with_a_number_per_step)
}


def record_plants() -> tuple[dict[str, Recorded], int]:
    plants = {name: plant() for name, plant in PLANTS.items()}
    return plants, bytes_of_parts()
