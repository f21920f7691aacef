"""Builds a `Trainer`: everything that a run needs."""

from switchtitan.builders.data import build_batches, build_evaluators, open_checked_corpus
from switchtitan.builders.reports import (
    build_hooks,
    build_profiler,
    build_rank_telemetry,
    build_region_times,
    build_reporter,
    build_throughput,
)
from switchtitan.builders.start import build_compute_dtype, read_state, read_warm_start
from switchtitan.builders.stepper import OnPart, build_stepper, ignore_part
from switchtitan.checkpoint import (
    CHECKPOINTS_FOLDER,
    Checkpointer,
    CheckpointTensors,
    check_given_paths,
)
from switchtitan.config.toml_text import resolved_toml
from switchtitan.data import Corpus
from switchtitan.distributed.world import World
from switchtitan.job.config import JobConfig
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability import configure_logging
from switchtitan.observability.environment import versions
from switchtitan.training.describe import (
    describe_run,
    run_facts,
    run_identity,
    start_output,
)
from switchtitan.training.step import TrainState
from switchtitan.training.stop import Stop
from switchtitan.training.trainer import RunSchedule, Trainer


def build_trainer(
    config: JobConfig, world: World, on_part: OnPart = ignore_part, stop: Stop | None = None
) -> Trainer:
    """Build everything that a run needs; restore its state if it resumes from a checkpoint.

    Args:
        stop: when to stop before the last step; by default never.

    Raises:
        UserError: if configuration, corpus and checkpoints do not fit together. Raised before
            anything is written.
    """
    configure_logging(is_main=world.is_main, rank=world.rank)
    # Checked before the corpus, whose preparation can take hours.
    check_given_paths(config.job.output_dir / CHECKPOINTS_FOLDER, config.checkpoint)
    corpus = open_checked_corpus(config, world)
    on_part("corpus")
    identity = run_identity(config, corpus)
    resolved = resolved_toml(config)
    checkpointer = build_checkpointer(config, world, identity, corpus, resolved)
    checkpoint = checkpointer.checkpoint_to_resume()
    state, changes = TrainState(), list[str]()
    if checkpoint is not None:
        state, changes = read_state(checkpoint, identity, resolved)
    # Built before the model, because this rejects a corpus that is too small.
    batches = build_batches(config, corpus, world, state)
    loss = CrossEntropy(config.compile.loss)
    evaluators = build_evaluators(config, corpus, loss, world)
    initial_weights = None
    if checkpoint is None:
        state, initial_weights = read_warm_start(config)
    compute_dtype = build_compute_dtype(config, world, state, changes)
    rank_telemetry = build_rank_telemetry(config, world, state)

    stepper = build_stepper(
        config,
        world,
        batches,
        compute_dtype=compute_dtype.dtype,
        state=state,
        loss=loss,
        initial_weights=initial_weights,
        is_restored=checkpoint is not None,
        on_part=on_part,
    )
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    if checkpoint is not None:
        tensors.restore(checkpoint, world)

    start_output(config, resolved, world, state)
    describe_run(
        config, world, stepper.model, corpus, compute_dtype, checkpoint, changes, state.step
    )
    facts = run_facts(config, world, stepper.model, corpus, compute_dtype)
    reporter = build_reporter(config, resolved, world, state, facts)
    return Trainer(
        stepper,
        schedule=build_schedule(config),
        evaluators=evaluators,
        checkpointer=checkpointer,
        tensors=tensors,
        reporter=reporter,
        throughput=build_throughput(config, stepper, compute_dtype),
        profiler=build_profiler(config, world, state, reporter),
        region_times=build_region_times(config, world),
        hooks=build_hooks(config, stepper, reporter, rank_telemetry),
        stop=stop,
    )


def build_schedule(config: JobConfig) -> RunSchedule:
    return RunSchedule(
        num_steps=config.training.steps,
        evaluate_interval=config.evaluation.interval,
        save_interval=config.checkpoint.interval,
        check_interval=config.parallelism.check_interval,
    )


def build_checkpointer(
    config: JobConfig, world: World, identity: dict, corpus: Corpus, resolved: str
) -> Checkpointer:
    return Checkpointer(
        config.job.output_dir / CHECKPOINTS_FOLDER,
        config.checkpoint,
        world,
        identity=identity,
        metadata={"config": resolved, "corpus": corpus.description, "num_ranks": world.size},
        versions=versions(),
    )
