"""Builds what a run reports: results, throughput, profiles and rank telemetry."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from switchtitan.builders.stepper import build_method
from switchtitan.config.toml_text import toml_value
from switchtitan.distributed.dtype import ComputeDtype
from switchtitan.distributed.world import World, device_name
from switchtitan.job.config import JobConfig
from switchtitan.observability import (
    TENSORBOARD_FOLDER,
    Profiler,
    Reporter,
    Throughput,
    peak_flops_per_s,
)
from switchtitan.observability.memory_snapshots import MemorySnapshots
from switchtitan.observability.region_times import RegionTimes
from switchtitan.observability.sinks import HParam, Sink
from switchtitan.training.hooks import Hook, InspectWeights
from switchtitan.training.step import Stepper, TrainState
from switchtitan.training.trainer import loss_metrics

# `spectra` and the communication counter are imported where they are used: most runs use none of
# them.
if TYPE_CHECKING:
    from switchtitan.spectra.telemetry import RankTelemetry


def build_rank_telemetry(
    config: JobConfig, world: World, state: TrainState
) -> "RankTelemetry | None":
    """Build the rank telemetry, None if it is off.

    Raises:
        CheckpointError: if the initial weights of a resumed run are missing.
    """
    if config.spectrum.interval is None:
        return None
    from switchtitan.spectra.telemetry import SPECTRA_FOLDER, RankTelemetry
    from switchtitan.spectra.weight_change import Origin

    method = build_method(config)
    origin = Origin(
        config.model, config.job.seed, state.initial_weights, state.initial_fingerprint, method
    )
    if state.step > 0 and world.is_main:
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
    config: JobConfig, resolved: str, world: World, state: TrainState, facts: Mapping[str, object]
) -> Reporter:
    first_loss = state.first_validation_loss
    hparams = compared_values(config, world.size)
    trackers = config.metrics.trackers if world.is_main else ()
    return Reporter(
        config.metrics,
        config.job.output_dir,
        num_steps=config.training.steps,
        start_step=state.step,
        is_main=world.is_main,
        description=resolved,
        facts=facts,
        first_validation=None if first_loss is None else loss_metrics("validation", first_loss),
        hparams=hparams,
        trackers=[
            build_tracker(tracker, config.job.output_dir, config.job.name, hparams)
            for tracker in trackers
        ],
    )


def build_tracker(
    tracker: str, output_dir: Path, run_name: str, hparams: Mapping[str, HParam]
) -> Sink:
    from switchtitan.observability import trackers

    return trackers.build_tracker(tracker, output_dir, run_name, hparams)


def compared_values(config: JobConfig, num_ranks: int) -> dict[str, HParam]:
    """Return the values of the configuration by which runs are compared, by dotted key."""
    sections = ("model", "method", "optimizer", "lr_schedule", "training", "parallelism")
    values: dict[str, object] = {
        f"{section}.{key}": value
        for section in sections
        for key, value in getattr(config, section).model_dump(mode="json").items()
    }
    values |= {"data.dataset": config.data.dataset, "data.seq_len": config.data.seq_len}
    values |= {"job.seed": config.job.seed, "ranks": num_ranks}
    return {
        key: value if isinstance(value, bool | int | float | str) else toml_value(value)
        for key, value in values.items()
        if value is not None
    }


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


def build_region_times(config: JobConfig, world: World) -> RegionTimes | None:
    return RegionTimes(world.device) if config.metrics.region_times else None


def build_memory_snapshots(config: JobConfig, world: World) -> MemorySnapshots:
    return MemorySnapshots(
        config.job.output_dir,
        world.rank,
        world.device,
        config.profiler.memory_snapshot_step,
        is_asked_for=config.profiler.observes(world.rank),
    )


def build_profiler(
    config: JobConfig, world: World, state: TrainState, reporter: Reporter
) -> Profiler:
    """Build the profiler, which reports a summary of all ranks' traces."""

    def summarize(trace: Path | None, regions: Collection[str]) -> None:
        from switchtitan.observability.profile_summary import read_summary

        own = None if trace is None else read_summary(trace, world.rank, regions)
        summaries = [summary for summary in world.gather(own) if summary is not None]
        if summaries and world.is_main:
            reporter.report_profile(state.step, summaries)

    return Profiler(
        config.profiler,
        config.job.output_dir / TENSORBOARD_FOLDER,
        rank=world.rank,
        steps_done=state.step,
        on_end=summarize,
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
    if config.metrics.layers:
        from switchtitan.training.layer_norms import LayerNorms

        hooks.append(LayerNorms(stepper, reporter))
    if config.profiler.memory_snapshot_step is not None:
        hooks.append(build_memory_snapshots(config, stepper.world))
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
