"""Builds a run from its configuration: a `Trainer`, or what takes its steps alone, a `Stepper`."""

import logging
from collections.abc import Generator
from pathlib import Path

import torch

from switchtitan.checkpoint.load import find_checkpoint, restore
from switchtitan.checkpoint.save import (
    CHECKPOINTS_FOLDER,
    Checkpointer,
    CheckpointMetadata,
    CheckpointTensors,
)
from switchtitan.config import resolved_toml
from switchtitan.contracts import Batch, SummedLoss
from switchtitan.data.corpus import VERIFIED_BYTES, Corpus, SplitName
from switchtitan.data.loader import ValidationBatches, build_train_batches
from switchtitan.data.prepare import open_corpus
from switchtitan.data.recorded import check_unchanged, find_recorded, record
from switchtitan.distributed.blocks import checkpoint_activations, compile_blocks
from switchtitan.distributed.dtype import dtype_on
from switchtitan.distributed.fsdp import cast_trained, materialize, pack_frozen_weights, shard_model
from switchtitan.distributed.gpus import peak_flops_per_s
from switchtitan.distributed.initial import ReadRows, check_replaced
from switchtitan.distributed.precision import allow_tf32, use_deterministic_algorithms
from switchtitan.distributed.world import World, device_name
from switchtitan.hub.initial_weights import checksum, find_weights, open_weights
from switchtitan.job.config import JobConfig
from switchtitan.methods import METHODS
from switchtitan.models import plain_model
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability.environment import versions
from switchtitan.observability.profiler import Profiler
from switchtitan.observability.reporter import Reporter
from switchtitan.observability.throughput import Throughput
from switchtitan.optim.lr_schedule import build_lr_schedule
from switchtitan.training.describe import (
    changes_since,
    describe_run,
    read_run,
    run_facts,
    run_identity,
)
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.output import start_output
from switchtitan.training.step import Stepper, TrainState
from switchtitan.training.stop import Stop
from switchtitan.training.trainer import Trainer
from switchtitan.workbench.spectra.weight_change import Origin, RankTelemetry

logger = logging.getLogger(__name__)


def build_trainer(config: JobConfig, world: World, stop: Stop | None = None) -> Trainer:
    """Builds everything that a run needs; restores its state if it resumes from a checkpoint.
    Raises a UserError if configuration, corpus and checkpoints do not fit together.

    Args:
        stop: when to stop before the last step; by default never.
    """
    # What it starts from. Only a new run prepares its corpus, which can take hours.
    identity, resolved = run_identity(config), resolved_toml(config)
    checkpoints = config.job.output_dir / CHECKPOINTS_FOLDER
    checkpoint = world.on_main(lambda: find_checkpoint(checkpoints, config.checkpoint))
    state, changes = TrainState(), list[str]()
    if checkpoint is None:
        corpus = open_corpus(config.data, ranks=world, model_vocab_size=config.model.vocab_size)
    else:
        metadata, state = read_run(checkpoint, config, identity)
        changes = changes_since(metadata.config, config, state.step)
        corpus = _reopen_corpus(checkpoint, metadata, config, world)
        if checkpoint.resolve().parent != checkpoints.resolve():
            state.forked_from = config.checkpoint.resume_path

    # What it reads. Before the model, because this rejects a corpus that is too small.
    batches = build_batches(config, corpus, world, state)
    loss, seq_len = CrossEntropy(config.compile.loss), config.data.seq_len

    def build_evaluator(split: SplitName, num_tokens: int) -> Evaluator:
        held_out = ValidationBatches(
            corpus.split(split, seq_len),
            num_sequences=num_tokens // seq_len,
            local_batch_size=config.training.local_batch_size,
            rank=world.rank,
            num_ranks=world.size,
        )
        return Evaluator(held_out, loss, world, lambda: held_out.text_size(corpus.tokenizer()))

    validation, test = build_evaluator("validation", config.evaluation.tokens), None
    if config.evaluation.test_tokens is not None:
        test = build_evaluator("test", config.evaluation.test_tokens)

    # The model and what updates it.
    compute_dtype = dtype_on(world.device, config.training.dtype, state.compute_dtype, world)
    config.model.check_device(world.device.type, compute_dtype.dtype)
    if state.compute_dtype not in (None, compute_dtype.name):
        changes.append(f"compute dtype: {state.compute_dtype} -> {compute_dtype.name}")
    state.compute_dtype = compute_dtype.name
    initial_weights, given = None, config.checkpoint.initial_weights
    if checkpoint is None and given is not None:
        initial_weights = _open_initial_weights(config, given, state, world)
    stepper = build_stepper(
        config,
        world,
        batches,
        compute_dtype=compute_dtype.dtype,
        state=state,
        loss=loss,
        initial_weights=initial_weights,
        is_restored=checkpoint is not None,
    )
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    if checkpoint is not None:
        restore(checkpoint, tensors, world)
    hooks = []
    if (interval := config.spectrum.interval) is not None:
        hooks.append(_build_telemetry(config, stepper, interval, checkpoint is not None))

    # What it writes: first here, after the checks.
    start_output(config.job.output_dir, resolved, world, state.step, config.training.steps)
    describe_run(config, stepper, corpus, compute_dtype, checkpoint, changes)
    checkpointer = Checkpointer(
        checkpoints,
        config.checkpoint,
        world,
        {
            "identity": identity | {"corpus": {"fingerprint": corpus.fingerprint}},
            "run": {"config": resolved, "num_ranks": world.size, **record(corpus)},
            "versions": versions(),
        },
        latest=checkpoint,
    )
    # Only the bf16 peaks are known.
    has_peak = compute_dtype.dtype == torch.bfloat16
    throughput = Throughput(
        tokens_per_step=config.training.global_batch_size * seq_len,
        flops_per_token=stepper.model.num_flops_per_token(seq_len) / world.size,
        peak_flops_per_s=peak_flops_per_s(device_name(world.device)) if has_peak else None,
        num_steps=config.training.steps,
        synchronize=world.synchronize,
        start_step=state.step,
    )
    reporter = Reporter(
        config.metrics,
        config.job.output_dir,
        num_steps=config.training.steps,
        start_step=state.step,
        is_main=world.is_main,
        description=resolved,
        facts=run_facts(config, world, stepper.model, corpus, compute_dtype),
    )
    return Trainer(
        stepper=stepper,
        num_steps=config.training.steps,
        evaluate_interval=config.evaluation.interval,
        validation=validation,
        test=test,
        checkpointer=checkpointer,
        tensors=tensors,
        reporter=reporter,
        throughput=throughput,
        profiler=Profiler(config.profiler, config.job.output_dir, world.rank, state.step),
        hooks=hooks,
        stop=stop or Stop(),
    )


def build_stepper(
    config: JobConfig,
    world: World,
    batches: Generator[list[Batch], None, None],
    *,
    compute_dtype: torch.dtype,
    state: TrainState | None = None,
    loss: SummedLoss | None = None,
    initial_weights: ReadRows | None = None,
    is_restored: bool = False,
) -> Stepper:
    """Builds what takes the steps of a run, under a `FakeTensorMode` too.

    Args:
        batches: see `build_batches`.
        compute_dtype: of activations and gradients.
        state, loss: by default those of a new run.
        initial_weights: reads the plain model's weights; by default they are random.
        is_restored: leaves the model's tensors uninitialized, since the caller restores them.
    """
    if config.training.deterministic:
        use_deterministic_algorithms()
    if config.training.tf32:
        allow_tf32()
    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    model = plain_model(config.model)
    plain_names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    method.prepare_model(model)
    check_replaced(model, plain_names)
    checkpoint_activations(model, config.activation_checkpoint)
    if config.compile.blocks:
        compile_blocks(model)
    if config.training.frozen_dtype == "int16":
        pack_frozen_weights(model)
    if config.training.trained_dtype == "bfloat16":
        cast_trained(model, torch.bfloat16)
    shard_model(model, world.shard_mesh, compute_dtype, config.parallelism)
    materialize(model, world.device, config.job.seed, initial_weights, is_restored)
    optimizer = method.build_optimizer(model, config.optimizer, config.compile.optimizer)
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


def _reopen_corpus(
    checkpoint: Path, metadata: CheckpointMetadata, config: JobConfig, world: World
) -> Corpus:
    """Opens the corpus that a run has recorded, on every rank; prepares nothing. Raises a
    CorpusError if it is not on this machine or damaged, or its files have changed since."""

    def open_own() -> Corpus:
        corpus = find_recorded(metadata.run, config.data.cache_dir, checkpoint)
        corpus.verify(VERIFIED_BYTES if world.is_node_main else 0)
        if world.is_node_main:
            check_unchanged(config.data, corpus)
        return corpus

    return world.together(open_own)[world.rank]


def build_batches(
    config: JobConfig, corpus: Corpus, world: World, state: TrainState
) -> Generator[list[Batch], None, None]:
    """Builds this rank's training batches, from `state.next_batch` on; `close` ends workers."""
    return build_train_batches(
        corpus.split("train", config.data.seq_len),
        seed=config.job.seed,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
        start_step=state.next_batch,
        num_workers=config.data.num_workers,
        pin_memory=world.device.type == "cuda",
    )


def _open_initial_weights(
    config: JobConfig, given: str, state: TrainState, world: World
) -> ReadRows:
    """Opens the weights that a new run starts from, and records in `state` which ones; collective.
    Raises a CheckpointError if the weights cannot be read, or belong to another model."""

    def find() -> tuple[Path, str]:
        source = find_weights(Path(given))
        return source, checksum(source)

    # Checksums read all bytes: once. Other ranks read only the rows that they hold.
    source, state.initial_fingerprint = world.on_main(find)
    state.initial_weights = str(source)
    weights = open_weights(source, config.model)
    logger.info("initial weights: %s", source)
    if not config.method.keeps_initial_weights:
        logger.warning(
            "[method] name = %r starts from an approximation of the initial weights",
            config.method.name,
        )
    return weights.read_rows


def _build_telemetry(
    config: JobConfig, stepper: Stepper, interval: int, is_restored: bool
) -> RankTelemetry:
    """Builds what measures ranks every `interval` steps. Raises a CheckpointError if the weights
    that a resumed run started from are missing."""
    method = METHODS.build(config.method, config.training.steps, config.job.seed)
    state, world = stepper.state, stepper.world
    source = state.initial_weights, state.initial_fingerprint
    origin = Origin(config.model, config.job.seed, *source, method)
    if is_restored:
        world.on_main(origin.open)
    return RankTelemetry(stepper.model, origin, world, interval, config.training.steps)
