"""Collectives whose tensors are used with or without waiting, on fake CUDA."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from support.fake_cuda.races import FindRaces
from support.fake_cuda.stepper import fake_cuda_stepper
from support.tiny import tiny_config


def planted_collectives(folder: str) -> dict[str, list[str]]:
    """Returns the races found for each of `WAITING` and `NOT_WAITING`, by name."""
    races = {}
    config = tiny_config(Path(folder), "full_rank", "--parallelism.replicate", "2", num_ranks=4)
    with fake_cuda_stepper(config, num_ranks=4, rank=0) as stepper:
        groups = [stepper.world.mesh.get_group(dimension) for dimension in (1, 0)]
        for name, plant in (WAITING | NOT_WAITING).items():
            with FindRaces() as found:
                own, full = (torch.ones(size, device=stepper.world.device) for size in (8, 16))
                plant(own, full, *groups)
            races[name] = found.found
    return races


Plant = Callable[[Tensor, Tensor, dist.ProcessGroup, dist.ProcessGroup], object]
"""Called with a tensor to gather, the result, and two groups of two ranks."""


def _wait(own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup) -> None:
    _gather(own, full, group).wait()
    own.add_(1)
    full.mul_(2)


def _reduce(own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup) -> None:
    dist.all_reduce(full, group=group)
    full.mul_(2)


def _read_input(own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup) -> None:
    work = _gather(own, full, group)
    own.mul(2)
    work.wait()


def _wait_for_later_work(
    own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup
) -> None:
    _gather(own, full, group)
    _gather(own, full.new_empty(full.shape), group).wait()
    full.mul_(2)


def _use_functional(
    own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup
) -> None:
    functional.all_reduce(full, "sum", group).mul(2)


def _read_result(own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup) -> None:
    _gather(own, full, group)
    full.mul(2)


def _write_input(own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup) -> None:
    work = _gather(own, full, group)
    own.add_(1)
    work.wait()


def _wait_in_another_stream(
    own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup
) -> None:
    work = _gather(own, full, group)
    with torch.cuda.stream(torch.cuda.Stream()):
        work.wait()
    full.mul(2)


def _wait_for_another_group(
    own: Tensor, full: Tensor, group: dist.ProcessGroup, other: dist.ProcessGroup
) -> None:
    _gather(own, full, group)
    _gather(own, full.new_empty(full.shape), other).wait()
    full.mul(2)


def _read_functional(
    own: Tensor, full: Tensor, group: dist.ProcessGroup, _: dist.ProcessGroup
) -> None:
    torch.ops._c10d_functional.all_reduce(full, "sum", group.group_name).mul(2)


def _gather(own: Tensor, full: Tensor, group: dist.ProcessGroup) -> dist.Work:
    work = dist.all_gather_single(full, own, group=group, async_op=True)
    assert work is not None
    return work


WAITING: dict[str, Plant] = {
    "asynchronous": _wait,
    "synchronous": _reduce,
    "the input is read": _read_input,
    "a later collective": _wait_for_later_work,
    "functional": _use_functional,
}
NOT_WAITING: dict[str, Plant] = {
    "the result is read at once": _read_result,
    "the input is written at once": _write_input,
    "another stream waits": _wait_in_another_stream,
    "another group is waited for": _wait_for_another_group,
    "functional, read at once": _read_functional,
}
