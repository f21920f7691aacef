"""A trainer whose tensors have shapes but no values, on any number of ranks."""

import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from switchtitan.build import (
    build_intervals,
    build_throughput,
    prepare_model,
)
from switchtitan.checkpoint import Checkpointer
from switchtitan.checkpoint.tensors import checkpoint_tensors, model_tensors
from switchtitan.contracts import Batch
from switchtitan.distributed.config import CompileConfig
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.world import World, mesh_shape, stop_world
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability import Profiler, Reporter, StepCommunication
from switchtitan.optim import build_lr_schedule
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.state import TrainState
from switchtitan.training.trainer import Trainer


@contextmanager
def fake_trainer(config: JobConfig, num_ranks: int) -> Iterator[Trainer]:
    """The first of `num_ranks` ranks' trainer, uncompiled, on the CPU, good for steps inside the context.

    Its tensors have shapes but no values, and its process group's collectives do nothing: it takes neither ranks, nor memory
    for the model, nor a corpus.

    Raises:
        EnvironmentMismatchError: if the ranks do not fill the mesh of `config`.
    """
    assert not dist.is_initialized(), "this process has ranks already"
    shape = mesh_shape(config.parallelism, num_ranks)
    with tempfile.TemporaryDirectory() as folder:
        # Alone in its process still, it makes no groups of ranks.
        checkpointer = Checkpointer(Path(folder), config.checkpoint, identity={}, metadata={}, is_main=True)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
        try:
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
            group = dist.group.WORLD
            assert group is not None
            world = World(0, num_ranks, torch.device("cpu"), mesh, group)
            with FakeTensorMode():
                yield _build_stepper(config, world, checkpointer, Path(folder))
        finally:
            stop_world()


def _build_stepper(config: JobConfig, world: World, checkpointer: Checkpointer, folder: Path) -> Trainer:
    """A trainer that is good for steps alone: it has no data to evaluate on, and writes nothing."""
    # Collectives stand between compiled regions, so compilation changes none.
    config = config.model_copy(update={"compile": CompileConfig()})
    with torch.device("meta"):
        model = MODELS.build(config.model)
    num_flops_per_token = model.num_flops_per_token(config.data.seq_len)
    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    prepare_model(model, method, config, world)
    optimizer = method.build_optimizer(model, config.optimizer, compile_step=False)
    loss = CrossEntropy(compile_regions=False)
    reporter = Reporter(
        config.metrics.model_copy(update={"tensorboard": False, "progress_bar": False}),
        folder,
        num_steps=config.training.steps,
        is_main=True,
    )
    return Trainer(
        # Values are unknown, so a step cannot be skipped for them.
        training=config.training.model_copy(update={"on_nonfinite": "stop"}),
        intervals=build_intervals(config),
        world=world,
        seed=config.job.seed,
        model=model,
        optimizer=optimizer,
        summed_loss=loss,
        lr_schedule=build_lr_schedule(config.lr_schedule, config.training.steps),
        batches=_batches_without_values(config, world.size),
        evaluator=Evaluator([], loss, world),
        test_evaluator=None,
        inspect_weights=None,
        checkpointer=checkpointer,
        tensors=checkpoint_tensors(model, optimizer),
        check_replicas=partial(check_replicas, model_tensors(model)),
        reporter=reporter,
        communication=StepCommunication(reporter, world.size, start_step=0),
        throughput=build_throughput(config, world, num_flops_per_token, start_step=0),
        profiler=Profiler(config.profiler, folder, worker=None),
        state=TrainState(),
    )


def _batches_without_values(config: JobConfig, num_ranks: int) -> Generator[list[Batch], None, None]:
    """Micro-batches of the right shapes, one list for each step."""
    shape = config.training.local_batch_size, config.data.seq_len
    num_micro_batches = config.training.global_batch_size // (num_ranks * config.training.local_batch_size)
    tokens = torch.zeros(shape, dtype=torch.int64)
    batch = Batch(tokens, targets=tokens, document_ids=tokens.int())
    while True:
        yield [batch] * num_micro_batches
