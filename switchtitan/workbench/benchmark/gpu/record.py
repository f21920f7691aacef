"""Records what compiled steps launch on a GPU: kernels, bytes and floating-point operations, and
the least time that these take."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from switchtitan.distributed.gpus import CARDS, Card
from switchtitan.errors import UserError
from switchtitan.job.config import JobConfig
from switchtitan.methods.operations import IMPLEMENTATIONS
from switchtitan.regions import observers
from switchtitan.workbench.benchmark.counters import CountingMode, num_flops, tensors_in
from switchtitan.workbench.benchmark.gpu import torch_inside
from switchtitan.workbench.benchmark.steppers import fake_stepper

NUM_STEPS = 2
"""Steps of each configuration. The last is recorded; nothing should compile in it."""
NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_pinned"),
    *("lift_fresh", "record_stream", "_unsafe_view", "_reshape_alias"),
}
"""Operations without a kernel that are not views."""
_NUM_LAUNCHES = {
    # FSDP's: a kernel for all parameters, after a copy of their addresses to the device
    # (aten/src/ATen/native/cuda/TensorShape.cu).
    "split_with_sizes_copy": 2,
    "chunk_cat": 2,
    # Before and after the main one: sums of products of output and gradient, and a cast
    # (flash_attn/src/flash_bwd_launch_template.h).
    "_scaled_dot_product_flash_attention_backward": 3,
}
"""Launches of operations with more than one."""
_ONLY_WRITE = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
"""Operations that do not read the tensors that they overwrite."""
# Of torch's multi_tensor_apply (aten/src/ATen/native/cuda/MultiTensorApply.cuh), by number of
# lists, in builds for CUDA 13, such as those of PyPI.
_TENSORS_PER_LAUNCH = {1: 770, 2: 448, 3: 336, 4: 252, 5: 210}
_BLOCKS_PER_LAUNCH = 2240
_ELEMENTS_PER_BLOCK = 65536


class Launch(NamedTuple):
    """Kernels of one operation, or one Triton kernel."""

    region: str
    kind: str
    """"triton", "extern" (called by compiled code), "eager" or "collective"."""
    name: str
    num_launches: int
    num_bytes: int
    """Read and written in device memory."""
    num_flops: int = 0
    """Of matrix products and attention."""
    dtype: str = ""
    """In which they are multiplied."""


class StepOnGpu(NamedTuple):
    """A compiled step on one architecture."""

    launches: list[tuple[Launch, int]]
    """Of the last step, and how often each happened."""
    compiled: list[list[str]]
    """Functions that each step compiled, each to one graph: a graph break is an error."""


def record_steps(configs: Mapping[str, JobConfig], num_ranks: int) -> dict[str, StepOnGpu]:
    """Takes steps of each configuration on rank 0; call by `call_with_gpus`. Raises a UserError if
    a step reads values of the device."""
    steps = {}
    for name, config in configs.items():
        try:
            steps[name] = record_step(config, num_ranks)
        except torch_inside.value_error() as error:
            message = f"{name}: cannot be recorded, since its step reads values of the device"
            raise UserError(f"{message} ({error})") from error
    return steps


def record_step(config: JobConfig, num_ranks: int = 1) -> StepOnGpu:
    """Takes steps of a configuration on rank 0, compiled from scratch, and records the last."""
    torch_inside.forget_compiled()
    compiled = []
    with fake_stepper(config, num_ranks, device="cuda:0") as stepper:
        for _ in range(NUM_STEPS):
            record = RecordLaunches()
            observers.append(record.around)
            with record:
                stepper.step()
            observers.remove(record.around)
            compiled.append(torch_inside.newly_compiled())
    launches = list(record.launches.items())
    return StepOnGpu(launches, compiled)


class RecordLaunches(CountingMode):
    """A context that records what a step on fake tensors launches, also in compiled regions."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[Launch] = Counter()
        self._regions = ["outside"]
        torch_inside.on_launch = self._launch

    @contextmanager
    def around(self, region: str) -> Iterator[None]:
        self._regions.append(region)
        yield
        self._regions.pop()

    def _launch(self, tuner: Any) -> None:
        meta = tuner.inductor_meta
        num_bytes = round(meta.get("kernel_num_gb", 0) * 1e9)
        self._add("triton", meta["kernel_name"], 1, num_bytes)

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        tensors = tensors_in((args, kwargs, result))
        if not any(tensor.device.type == "cuda" for tensor in tensors):
            return
        namespace, _, name = func.name().split(".")[0].partition("::")
        # "prim" asks a tensor for its device.
        if namespace == "prim" or name in NO_KERNEL:
            return
        if func.is_view:  # `to`, a view, may copy
            storage = args[0].untyped_storage()
            if all(part.untyped_storage() is storage for part in tensors_in(result)):
                return
        if name == "copy_" and args[0] is args[1]:  # nor has a copy to itself
            return
        if func in IMPLEMENTATIONS:
            with self:  # what it launches
                IMPLEMENTATIONS[func](*args, **kwargs)
            return
        kind = "extern" if torch_inside.running_graphs else "eager"
        if namespace in ("c10d", "_c10d_functional"):
            kind = "collective"
        flops = num_flops(func, args, kwargs, result)
        names = (argument.name for argument in func._schema.arguments)
        if ("is_causal", True) in zip(names, args, strict=False):
            flops //= 2  # it leaves out the products of later keys
        factors = tensors_in(args)[1:] if name.startswith("addmm") else tensors
        dtypes = [str(tensor.dtype) for tensor in factors if tensor.is_floating_point()]
        self._add(
            kind,
            name,
            _num_launches(name, args) + _copies_first(name, args, kwargs, result),
            num_bytes_of(name, func, args, kwargs, result),
            flops,
            dtypes[0].removeprefix("torch.") if flops else "",
        )

    def _add(self, *launch: Any) -> None:
        self.launches[Launch(self._regions[-1], *launch)] += 1


torch_inside.let_random_pass(RecordLaunches)


def num_bytes_of(name: str, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the bytes that an operation reads, and those that it writes."""
    if name == "embedding":
        return 2 * _num_bytes(tensors_in(result))
    if name == "all_gather_copy_in":
        # Into this rank's part of what is gathered.
        return 2 * _num_bytes(args[0])
    if name in ("index_put", "index_put_"):
        return 2 * _num_bytes(tensors_in(args[2])) + _num_bytes(tensors_in(args[1]))
    arguments = func._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    given |= kwargs
    written = [argument for argument in arguments if argument.is_write]
    only_written = {argument.name for argument in written if argument.kwarg_only}
    if name in _ONLY_WRITE or kwargs.get("beta") == 0:
        only_written.add(arguments[0].name)
    read = [value for key, value in given.items() if key not in only_written]
    # Fused optimizers declare that they write gradients, which only a scale overwrites.
    outputs = [given.get(argument.name) for argument in written if argument.name != "grads"]
    num_copied = 0
    if _copies_first(name, args, kwargs, result):
        num_copied = 2 * _num_bytes(tensors_in(result))
    return _num_bytes(tensors_in(read)) + _num_bytes(tensors_in([outputs, result])) + num_copied


def _copies_first(name: str, args: tuple, kwargs: Mapping[str, Any], result: Any) -> bool:
    """Whether a product first copies the matrix that it adds to, and then overwrites the copy.

    (aten/src/ATen/native/cuda/Blas.cpp)
    """
    return (
        name in ("addmm", "baddbmm")
        and kwargs.get("beta") != 0
        and args[0].dim() == result.dim()
        and args[0] is not result
    )


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _num_launches(name: str, args: tuple) -> int:
    if name.startswith("_foreach_"):
        # Norms of chunks, for which zeros are allocated, are added up in one more launch.
        # (aten/src/ATen/native/cuda/ForeachReduceOp.cu)
        return num_launches_of_lists(lists_in(args)) + 2 * (name == "_foreach_norm")
    if name == "all_gather_copy_in":
        # `_foreach_copy_` into parts of one tensor.
        # (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py)
        return num_launches_of_lists([args[0], args[0]])
    if name.startswith("_fused_adam"):
        # Weights, gradients and two moments.
        return _num_launches_of_alike(lists_in(args)[:4])
    return _NUM_LAUNCHES.get(name, 1)


def lists_in(args: tuple) -> list[list[Tensor]]:
    """Returns the lists of tensors of an operation on lists."""
    return [[*part] for part in args if isinstance(part, list | tuple) and tensors_in(part[:1])]


def num_launches_of_lists(lists: list[list[Tensor]]) -> int:
    """Returns the kernels of an operation on lists: one for each entry without the fast path.

    That needs one dtype in each list, dense tensors, and entries of a position that match.
    (aten/src/ATen/native/ForeachUtils.h)
    """
    is_fast = all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in lists) and all(
        tensor.is_contiguous() and (tensor.shape, tensor.stride()) == (first.shape, first.stride())
        for first, *others in zip(*lists, strict=True)
        for tensor in (first, *others)
    )
    return _num_launches_of_alike(lists) if is_fast else len(lists[0])


def _num_launches_of_alike(lists: list[list[Tensor]]) -> int:
    num_launches = num_tensors = num_blocks = 0
    for tensor in lists[0]:
        num_tensors += 1
        for _ in range(math.ceil(tensor.numel() / _ELEMENTS_PER_BLOCK)):
            num_blocks += 1
            if num_blocks == _BLOCKS_PER_LAUNCH:
                # The tensor that is split here is also in the next launch.
                num_launches, num_tensors, num_blocks = num_launches + 1, 1, 0
        if num_tensors == _TENSORS_PER_LAUNCH[len(lists)]:
            num_launches, num_tensors, num_blocks = num_launches + 1, 0, 0
    return num_launches + (num_blocks > 0)


# The least time in which a card could run the launches (roofline).
@dataclass
class Cost:
    """Sums over launches of one rank."""

    num_launches: int = 0
    num_bytes: int = 0
    num_flops: int = 0
    seconds: float = 0.0
    """The bound on a card."""


def costs_by(launches: Iterable[tuple[Launch, int]], card: Card, *keys: str) -> dict[tuple, Cost]:
    """Returns the costs of launches by some of their attributes, e.g. "region"; by () the total."""
    costs: dict[tuple, Cost] = {}
    for launch, number in launches:
        cost = costs.setdefault(tuple(getattr(launch, key) for key in keys), Cost())
        cost.num_launches += number * launch.num_launches
        cost.num_bytes += number * launch.num_bytes
        cost.num_flops += number * launch.num_flops
        cost.seconds += number * bound_s(launch, card)
    return costs


def bounds_s(steps: Mapping[str, StepOnGpu]) -> dict[str, float]:
    """Returns the least seconds of a step on each card whose architecture is in `steps`."""
    return {
        name: costs_by(steps[card.arch].launches, card)[()].seconds
        for name, card in CARDS.items()
        if card.arch in steps
    }


def bound_s(launch: Launch, card: Card) -> float:
    """Returns the least seconds of a launch; 0 for a collective."""
    if launch.kind == "collective":
        return 0.0
    return max(launch.num_bytes / card.bandwidth, launch.num_flops / card.flops_per_s(launch.dtype))
