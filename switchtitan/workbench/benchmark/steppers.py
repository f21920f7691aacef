"""Steppers to measure: on real ranks and data, or on fake tensors for any number of ranks."""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from switchtitan.contracts import Batch
from switchtitan.data.prepare import open_corpus
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.world import World, mesh_shape, start_world, stop_world
from switchtitan.job.config import JobConfig
from switchtitan.observability.log import configure_logging
from switchtitan.training.build import build_batches, build_stepper
from switchtitan.training.step import Stepper, TrainState


@contextmanager
def real_stepper(config: JobConfig) -> Iterator[Stepper]:
    """Yields the stepper of a new run and closes it; writes no files but the corpus."""
    world = start_world(config.parallelism)
    configure_logging(is_main=world.is_main, rank=world.rank)
    corpus = open_corpus(config.data, ranks=world, model_vocab_size=config.model.vocab_size)
    batches = build_batches(config, corpus, world, TrainState())
    dtype = dtype_on(world.device, config.training.dtype, world=world).dtype
    with closing(build_stepper(config, world, batches, compute_dtype=dtype)) as stepper:
        yield stepper


@contextmanager
def fake_stepper(
    config: JobConfig, num_ranks: int, device: str = "cpu", rank: int = 0
) -> Iterator[Stepper]:
    """Yields the stepper of one of `num_ranks` ranks: on a CPU, uncompiled.

    Its tensors are fake (shapes without values), and its collectives do nothing: it requires no
    ranks, no memory for the model and no corpus. dtype "auto" is bf16, as on current GPUs. Run
    steps inside the context. A process must not take several ranks, since torch caches the shapes
    of a rank's shards. Raises an EnvironmentMismatchError if the model cannot train on the device,
    or the ranks do not fill the mesh of `config`.

    Args:
        device: "cuda:0" in a process of `call_with_gpus`, where regions compile as `config` says.
    """
    assert not dist.is_initialized(), "this process already has a process group"
    shape = mesh_shape(config.parallelism, num_ranks)
    training, seq_len = config.training, config.data.seq_len
    num_micro_batches = training.global_batch_size // (num_ranks * training.local_batch_size)
    compute_dtype = torch.float32 if training.dtype == "float32" else torch.bfloat16
    model = config.model
    if device == "cpu":
        model = model.on_any_machine()
        model.check_device(device, compute_dtype)
    without_values = {
        "model": model,
        # "skip" reads the norm.
        "training": training.model_copy(update={"on_nonfinite": "stop"}),
        # Compilation changes no collectives.
        "compile": CompileConfig() if device == "cpu" else config.compile,
    }
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        mesh = init_device_mesh(
            torch.device(device).type, shape, mesh_dim_names=("replicate", "shard")
        )
        group = dist.group.WORLD
        assert group is not None
        with FakeTensorMode():
            yield build_stepper(
                config.model_copy(update=without_values),
                World(rank, num_ranks, torch.device(device), mesh, group),
                fake_batches(training.local_batch_size, seq_len, num_micro_batches),
                compute_dtype=compute_dtype,
            )
    finally:
        stop_world()


def fake_batches(
    num_sequences: int, seq_len: int, num_micro_batches: int
) -> Generator[list[Batch], None, None]:
    """Yields the micro-batches of each step, all the same zeros; read it in `FakeTensorMode`."""
    tokens = torch.zeros(num_sequences, seq_len, dtype=torch.int64)
    batch = Batch(tokens, targets=tokens, document_ids=tokens.int())
    while True:
        yield [batch] * num_micro_batches
