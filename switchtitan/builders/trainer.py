"""Builds a `Trainer`, or a `Stepper` alone, from a configuration: one short function per part."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import switchtitan
from switchtitan.builders.data import build_batches, build_evaluators, open_checked_corpus
from switchtitan.builders.start import build_compute_dtype, read_state, read_warm_start
from switchtitan.builders.stepper import OnPart, build_method, build_stepper, ignore_part
from switchtitan.checkpoint import Checkpointer, check_given_paths
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.config.toml_text import resolved_toml
from switchtitan.data import Corpus
from switchtitan.distributed.compute_dtype import ComputeDtype
from switchtitan.distributed.world import World, device_name
from switchtitan.job.config import JobConfig
from switchtitan.models.loss import CrossEntropy
from switchtitan.observability import (
    TENSORBOARD_FOLDER,
    Profiler,
    Reporter,
    Throughput,
    configure_logging,
    peak_flops_per_s,
)
from switchtitan.training.description import (
    comparable_identity,
    describe_run,
    run_facts,
    run_identity,
    start_output,
)
from switchtitan.training.hooks import Hook, InspectWeights
from switchtitan.training.output_folder import check_output_dir
from switchtitan.training.stepper import Stepper, TrainState
from switchtitan.training.trainer import RunSchedule, Trainer, loss_metrics

# `spectra` and the communication counter are imported where they are used: most runs use
# none of them.
if TYPE_CHECKING:
    from switchtitan.spectra.telemetry import RankTelemetry


def build_trainer(config: JobConfig, world: World, on_part: OnPart = ignore_part) -> Trainer:
    """Build everything that a run needs; restore its state if it resumes from a checkpoint.

    Raises:
        UserError: if configuration, corpus and checkpoints do not fit together. Raised before
            anything is written.
    """
    configure_logging(is_main=world.is_main, rank=world.rank)
    check_output_dir(config.job.output_dir, world)
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
        on_part=on_part,
    )
    tensors = CheckpointTensors(stepper.model, stepper.optimizer)
    if checkpoint is not None:
        tensors.restore(checkpoint)

    start_output(config, resolved, world, state)
    describe_run(config, world, stepper.model, corpus, compute_dtype, checkpoint, changes)
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
        profiler=build_profiler(config, world, state),
        hooks=build_hooks(config, stepper, reporter, rank_telemetry),
    )


def build_schedule(config: JobConfig) -> RunSchedule:
    return RunSchedule(
        num_steps=config.training.steps,
        evaluate_interval=config.evaluation.interval,
        save_interval=config.checkpoint.interval,
    )


def build_checkpointer(
    config: JobConfig, world: World, identity: dict, corpus: Corpus, resolved: str
) -> Checkpointer:
    return Checkpointer(
        config.job.output_dir / CHECKPOINTS_FOLDER,
        config.checkpoint,
        identity=identity,
        metadata={"config": resolved, "corpus": corpus.description, "num_ranks": world.size},
        versions={"switchtitan": switchtitan.__version__},
        comparable_identity=comparable_identity,
        is_main=world.is_main,
        group=world.host_group,
        background_group=world.new_host_group(),
    )


def build_rank_telemetry(
    config: JobConfig, world: World, state: TrainState
) -> "RankTelemetry | None":
    """Build the rank telemetry, None if it is off.

    Raises:
        CheckpointError: if the initial weights of a resumed run are missing.
    """
    if config.spectrum.interval is None:
        return None
    from switchtitan.spectra.spectra_files import SPECTRA_FOLDER
    from switchtitan.spectra.telemetry import RankTelemetry
    from switchtitan.spectra.weight_change import Origin

    origin = Origin(config.model, config.job.seed, state.initial_weights, state.initial_fingerprint)
    if state.step > 0:
        origin.open()
    return RankTelemetry(
        dense_weights=build_method(config).dense_weights,
        origin=origin,
        folder=config.job.output_dir / SPECTRA_FOLDER,
        start_step=state.step,
        device=world.device,
        is_main=world.is_main,
        broadcast=world.broadcast,
    )


def build_reporter(
    config: JobConfig, resolved: str, world: World, state: TrainState, facts: Mapping[str, object]
) -> Reporter:
    first_loss = state.first_validation_loss
    return Reporter(
        config.metrics,
        config.job.output_dir,
        num_steps=config.training.steps,
        start_step=state.step,
        is_main=world.is_main,
        description=resolved,
        facts=facts,
        first_validation=None if first_loss is None else loss_metrics("validation", first_loss),
    )


def build_throughput(
    config: JobConfig, stepper: Stepper, compute_dtype: ComputeDtype
) -> Throughput:
    world = stepper.world
    # Only the bf16 peaks are known.
    is_bf16 = compute_dtype.name == "bfloat16"
    peak = peak_flops_per_s(device_name(world.device)) if is_bf16 else None
    return Throughput(
        tokens_per_step=config.training.global_batch_size * config.data.seq_len,
        flops_per_token=stepper.model.num_flops_per_token(config.data.seq_len),
        num_devices=world.size,
        peak_flops_per_s=peak,
        num_steps=config.training.steps,
        start_step=stepper.state.step,
    )


def build_profiler(config: JobConfig, world: World, state: TrainState) -> Profiler:
    return Profiler(
        config.profiler,
        config.job.output_dir / TENSORBOARD_FOLDER,
        worker="rank0" if world.is_main else None,
        steps_done=state.step,
    )


def build_hooks(
    config: JobConfig,
    stepper: Stepper,
    reporter: Reporter,
    rank_telemetry: "RankTelemetry | None",
) -> list[Hook]:
    """Build the hooks that a run calls around its steps, such as rank telemetry."""
    hooks: list[Hook] = []
    if config.metrics.communication:
        from switchtitan.observability.communication_report import StepCommunication

        hooks.append(StepCommunication(reporter, stepper.state.step))
    if rank_telemetry is not None and config.spectrum.interval is not None:
        hooks.append(
            InspectWeights(
                rank_telemetry,
                stepper.model,
                reporter,
                interval=config.spectrum.interval,
                num_steps=config.training.steps,
            )
        )
    return hooks
