"""Builds a `Stepper`: the model, the optimizer and what takes the steps of a run."""

from collections.abc import Callable, Generator, Mapping

import torch
from torch import Tensor

from switchtitan.contracts import Batch, LanguageModel, Method, SummedLoss
from switchtitan.distributed.blocks import (
    checkpoint_activations,
    compile_blocks,
)
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.fsdp import (
    cast_frozen_weights,
    materialize,
    materialize_to_restore,
    shard_model,
)
from switchtitan.distributed.precision import allow_tf32, use_deterministic_algorithms
from switchtitan.distributed.world import World
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy
from switchtitan.optim import build_lr_schedule
from switchtitan.training.step import Stepper, TrainState

OnPart = Callable[[str], None]
"""Called with "corpus", "model" or "optimizer" when that part is built."""


def ignore_part(part: str) -> None:
    """An `OnPart` that does nothing."""


def build_stepper(
    config: JobConfig,
    world: World,
    batches: Generator[list[Batch], None, None],
    *,
    compute_dtype: torch.dtype | None = None,
    state: TrainState | None = None,
    loss: SummedLoss | None = None,
    initial_weights: Mapping[str, Tensor] | None = None,
    is_restored: bool = False,
    on_part: OnPart = ignore_part,
) -> Stepper:
    """Build what takes the steps of a run, without evaluation, saving and reports.

    Works under a `FakeTensorMode` too.

    Args:
        batches: see `build_batches`.
        compute_dtype: of activations and gradients; by default the configuration's on this device.
        state: the run's state, by default a new run's.
        loss: by default the configuration's.
        initial_weights: the plain model's weights by name; by default they are random.
        is_restored: whether the caller restores model and optimizer from a checkpoint. The model's
            tensors are not initialized then.
    """
    if config.training.deterministic:
        use_deterministic_algorithms()
    if config.training.tf32:
        allow_tf32()
    model = build_plain_model(config)
    method = build_method(config)
    if compute_dtype is None:
        compute_dtype = dtype_on(world.device, config.training.dtype).dtype
    prepare_model(model, method, config, world, compute_dtype)
    if is_restored:
        materialize_to_restore(model, world.device, config.job.seed)
    else:
        materialize(model, world.device, config.job.seed, initial_weights)
    on_part("model")
    optimizer = method.build_optimizer(model, config.optimizer, config.compile.optimizer)
    on_part("optimizer")
    return Stepper(
        model=model,
        optimizer=optimizer,
        loss=loss or CrossEntropy(config.compile.loss),
        lr_schedule=build_lr_schedule(config.lr_schedule, config.training.steps),
        batches=batches,
        world=world,
        parallelism=config.parallelism,
        seed=config.job.seed,
        max_grad_norm=config.training.max_grad_norm,
        on_nonfinite=config.training.on_nonfinite,
        state=state or TrainState(),
    )


def build_plain_model(config: JobConfig) -> LanguageModel:
    """Build the model without the method's changes, on the meta device."""
    with torch.device("meta"):
        return MODELS.build(config.model)


def build_method(config: JobConfig) -> Method:
    return METHODS.build(config.method, config.training.steps, config.job.seed)


def prepare_model(
    model: LanguageModel,
    method: Method,
    config: JobConfig,
    world: World,
    compute_dtype: torch.dtype,
) -> None:
    """Convert a plain model to a sharded one, both on the meta device."""
    method.prepare_model(model)
    checkpoint_activations(
        model,
        config.activation_checkpoint,
        preserve_rng_state=model.draws_in_forward or config.method.draws_in_forward(),
    )
    if config.compile.blocks:
        compile_blocks(model)
    cast_frozen_weights(model, getattr(torch, config.training.frozen_dtype))
    shard_model(model, world.shard_mesh, compute_dtype, config.parallelism)
