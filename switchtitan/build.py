"""The composition root: from a configuration to a trainer, one short function for each part."""

import logging
from collections.abc import Generator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import switchtitan
from switchtitan.checkpoint import (
    Checkpointer,
    check_given_paths,
    check_same_run,
    read_metadata,
)
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.checkpoint.tensors import checkpoint_tensors, model_tensors, restore
from switchtitan.config.toml_text import resolved_toml
from switchtitan.contracts import Batch, LanguageModel, Method, SummedLoss
from switchtitan.data import (
    Corpus,
    TokenSequences,
    build_train_batches,
    build_validation_batches,
    open_corpus,
)
from switchtitan.distributed.activation_checkpoint import checkpoint_activations
from switchtitan.distributed.activation_offload import CallWithInputOnHost
from switchtitan.distributed.compile import compile_blocks
from switchtitan.distributed.fsdp import cast_frozen_weights, materialize, shard_model
from switchtitan.distributed.host_copies import HostCopies
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.world import World, device_name
from switchtitan.hub.initial_weights import fingerprint, read_initial_weights
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability import (
    TENSORBOARD_FOLDER,
    Profiler,
    Reporter,
    StepCommunication,
    Throughput,
    configure_logging,
    peak_flops_per_s,
)
from switchtitan.optim import build_lr_schedule
from switchtitan.spectra.spectra_files import SPECTRA_FOLDER
from switchtitan.spectra.telemetry import RankTelemetry
from switchtitan.spectra.weight_change import Origin
from switchtitan.training.description import (
    changed_keys,
    comparable_identity,
    describe_run,
    run_facts,
    run_identity,
)
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.output import check_output_dir, start_output
from switchtitan.training.state import TrainState
from switchtitan.training.trainer import Intervals, Trainer, loss_metrics

logger = logging.getLogger(__name__)


def build_trainer(config: JobConfig, world: World) -> Trainer:
    """Everything that a run needs, its state restored where it goes on from a checkpoint.

    Raises:
        UserError: before anything is written, where configuration, corpus and checkpoints do not fit together.
    """
    output_dir = config.job.output_dir
    configure_logging(is_main=world.is_main, rank=world.rank)
    check_output_dir(output_dir)
    # Preparing a corpus can take hours.
    check_given_paths(output_dir / CHECKPOINTS_FOLDER, config.checkpoint)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    corpus = open_corpus(config.data, is_main=world.is_main, broadcast=world.broadcast)
    corpus.check_vocabulary(model.vocab_size)
    identity = run_identity(config, corpus)
    checkpointer = build_checkpointer(config, world, identity, corpus)
    checkpoint = checkpointer.checkpoint_to_resume()
    state, changes = TrainState(), list[str]()
    if checkpoint is not None:
        state, changes = read_state(checkpoint, identity, config)
    # Before any work, since a corpus that is too small for the configuration is refused here.
    batches = build_batches(config, corpus, world, state.num_batches)
    validation = corpus.split("validation", config.data.seq_len)
    test_tokens = config.evaluation.test_tokens
    test = None if test_tokens is None else corpus.split("test", config.data.seq_len)
    num_flops_per_token = model.num_flops_per_token(config.data.seq_len)
    initial_weights = None if checkpoint is not None else read_warm_start_(state, config, model)

    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    rank_telemetry = build_rank_telemetry(config, world, method, state)
    prepare_model(model, method, config, world, initial_weights)
    optimizer = method.build_optimizer(model, config.optimizer, config.compile.optimizer)
    tensors = checkpoint_tensors(model, optimizer)
    if checkpoint is not None:
        restore(checkpoint, tensors(), optimizer)

    start_output(config, world, state)
    describe_run(config, world, model, corpus, checkpoint, changes)
    loss = CrossEntropy(config.compile.loss)
    reporter = build_reporter(config, world, state, run_facts(config, world, model, corpus))
    return Trainer(
        training=config.training,
        intervals=build_intervals(config),
        world=world,
        seed=config.job.seed,
        model=model,
        optimizer=optimizer,
        summed_loss=loss,
        lr_schedule=build_lr_schedule(config.lr_schedule, config.training.steps),
        batches=batches,
        evaluator=build_evaluator(config, validation, config.evaluation.tokens, loss, world),
        test_evaluator=None
        if test is None or test_tokens is None
        else build_evaluator(config, test, test_tokens, loss, world),
        inspect_weights=rank_telemetry,
        checkpointer=checkpointer,
        tensors=tensors,
        check_replicas=partial(check_replicas, model_tensors(model)),
        reporter=reporter,
        communication=StepCommunication(reporter, world.size, state.step),
        throughput=build_throughput(config, world, num_flops_per_token, state.step),
        profiler=Profiler(
            config.profiler,
            output_dir / TENSORBOARD_FOLDER,
            worker="rank0" if world.is_main else None,
            steps_done=state.step,
        ),
        state=state,
    )


def read_state(checkpoint: Path, identity: dict, config: JobConfig) -> tuple[TrainState, list[str]]:
    """Where the run of a checkpoint stands, and which keys have changed since.

    Raises:
        CheckpointError: if it is another run's.
    """
    metadata = read_metadata(checkpoint)
    check_same_run(comparable_identity(metadata.identity), identity)
    state = TrainState(**metadata.train_state)  # type: ignore[arg-type]
    return state, changed_keys(str(metadata.run["config"]), config)


def read_warm_start_(state: TrainState, config: JobConfig, model: nn.Module) -> dict[str, Tensor] | None:
    """The weights that a new run starts from, which its state remembers; None where they are drawn.

    Raises:
        CheckpointError: if they cannot be read, or are another model's.
    """
    if config.checkpoint.initial_weights is None:
        return None
    source, weights = read_initial_weights(
        Path(config.checkpoint.initial_weights), model, config.model.model_dump(mode="json")
    )
    logger.info("initial weights come from %s", source)
    state.initial_weights, state.initial_fingerprint = str(source), fingerprint(source)
    return weights


def build_intervals(config: JobConfig) -> Intervals:
    return Intervals(
        evaluate=config.evaluation.interval,
        save=config.checkpoint.interval,
        inspect=config.spectrum.interval,
    )


def prepare_model(
    model: LanguageModel,
    method: Method,
    config: JobConfig,
    world: World,
    initial_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """From a plain model on the meta device to a sharded one on this rank's device, with its initial values."""
    method.prepare_model(model)
    checkpoint_activations(model, config.activation_checkpoint)
    if config.activation_checkpoint.offload:
        model.call_block = CallWithInputOnHost(HostCopies(world.device))
    if config.compile.blocks:
        compile_blocks(model)
    cast_frozen_weights(model, getattr(torch, config.training.frozen_dtype))
    dtype = getattr(torch, config.training.dtype)
    parallelism = config.parallelism
    shard_model(model, world.shard_mesh, dtype, parallelism.reshard_after_forward, parallelism.frozen_weights)
    materialize(model, world.device, config.job.seed, initial_weights)


def build_checkpointer(config: JobConfig, world: World, identity: dict, corpus: Corpus) -> Checkpointer:
    return Checkpointer(
        config.job.output_dir / CHECKPOINTS_FOLDER,
        config.checkpoint,
        identity=identity,
        metadata={"config": resolved_toml(config), "corpus": corpus.description, "num_ranks": world.size},
        versions={"switchtitan": switchtitan.__version__},
        comparable_identity=comparable_identity,
        is_main=world.is_main,
    )


def build_batches(
    config: JobConfig, corpus: Corpus, world: World, start_step: int
) -> Generator[list[Batch], None, None]:
    return build_train_batches(
        corpus.split("train", config.data.seq_len),
        seed=config.job.seed,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
        start_step=start_step,
        num_workers=config.data.num_workers,
        pin_memory=world.device.type == "cuda",
    )


def build_evaluator(
    config: JobConfig,
    sequences: TokenSequences,
    num_tokens: int,
    loss: SummedLoss,
    world: World,
) -> Evaluator:
    batches = build_validation_batches(
        sequences,
        num_sequences=num_tokens // config.data.seq_len,
        local_batch_size=config.training.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
    )
    return Evaluator(batches, loss, world)


def build_rank_telemetry(
    config: JobConfig, world: World, method: Method, state: TrainState
) -> RankTelemetry | None:
    """None where it is off.

    Raises:
        CheckpointError: if the weights that a resumed run started from are no longer at hand.
    """
    if config.spectrum.interval is None:
        return None
    origin = Origin(config.model, config.job.seed, state.initial_weights, state.initial_fingerprint)
    if state.step > 0:
        origin.open()
    return RankTelemetry(
        dense_weights=method.dense_weights,
        origin=origin,
        folder=config.job.output_dir / SPECTRA_FOLDER,
        start_step=state.step,
        device=world.device,
        is_main=world.is_main,
        broadcast=world.broadcast,
    )


def build_reporter(
    config: JobConfig, world: World, state: TrainState, facts: Mapping[str, object]
) -> Reporter:
    first_loss = state.first_validation_loss
    return Reporter(
        config.metrics,
        config.job.output_dir,
        num_steps=config.training.steps,
        start_step=state.step,
        is_main=world.is_main,
        description=resolved_toml(config),
        facts=facts,
        first_validation=None if first_loss is None else loss_metrics("validation", first_loss),
    )


def build_throughput(
    config: JobConfig, world: World, num_flops_per_token: int, start_step: int
) -> Throughput:
    # The known peaks are those of bf16.
    peak = peak_flops_per_s(device_name(world.device)) if config.training.dtype == "bfloat16" else None
    return Throughput(
        tokens_per_step=config.training.global_batch_size * config.data.seq_len,
        flops_per_token=num_flops_per_token,
        num_devices=world.size,
        peak_flops_per_s=peak,
        num_steps=config.training.steps,
        start_step=start_step,
    )
