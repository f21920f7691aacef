"""A training step on fake CUDA tensors."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from support.fake_cuda import collectives, python_api
from switchtitan.builders import stepper as builder
from switchtitan.builders.stepper import build_stepper
from switchtitan.contracts import Batch
from switchtitan.distributed.fsdp import _allocate
from switchtitan.distributed.world import World, mesh_shape, stop_world
from switchtitan.job.config import JobConfig
from switchtitan.training.stepper import Stepper


@contextmanager
def fake_cuda_stepper(config: JobConfig, num_ranks: int, rank: int) -> Iterator[Stepper]:
    """Yields the stepper of one of `num_ranks` ranks with a CUDA device each.

    Load the library before torch, and install `python_api`. Run steps inside the context.
    """
    # Otherwise every operation waits for the streams of all earlier steppers.
    python_api.forget_streams()
    collectives.forget_streams()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        shape = mesh_shape(config.parallelism, num_ranks)
        mesh = init_device_mesh("cuda", shape, mesh_dim_names=("replicate", "shard"))
        group = dist.group.WORLD
        assert group is not None
        world = World(rank, num_ranks, torch.device("cuda", 0), mesh, group)
        with FakeTensorMode():
            yield build_stepper(config, world, _batches(config, num_ranks))
    finally:
        stop_world()


def _batches(config: JobConfig, num_ranks: int) -> Generator[list[Batch], None, None]:
    """Yields micro-batches in page-locked memory, as the data loader does with a GPU."""
    shape = config.training.local_batch_size, config.data.seq_len
    num_micro_batches = config.training.global_batch_size // (
        num_ranks * config.training.local_batch_size
    )
    while True:
        tokens, targets, document_ids = (
            torch.zeros(shape, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.int32)
        )
        for part in (tokens, targets, document_ids):
            python_api.pinned_memory.add(part)
        yield [Batch(tokens, targets, document_ids)] * num_micro_batches


def without_initial_values() -> Any:
    """A patch with which steppers allocate weights and do not draw them, which takes a third of the
    time to build them."""
    return patch.object(builder, "materialize", lambda model, device, *_: _allocate(model, device))
