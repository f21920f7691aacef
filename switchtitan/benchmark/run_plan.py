"""What a training run would do, found without training, and without writing anything."""

from dataclasses import dataclass
from pathlib import Path

import torch

from switchtitan.benchmark.data_plan import DataPlan, plan_data
from switchtitan.benchmark.estimate import StepEstimate, estimate_step
from switchtitan.benchmark.steppers import fake_stepper
from switchtitan.builders.start import read_state
from switchtitan.builders.trainer import build_schedule
from switchtitan.checkpoint import check_given_paths, check_same_run, read_metadata
from switchtitan.checkpoint.disk_space import (
    check_room,
    estimate_bytes,
    free_bytes,
    num_additional_checkpoints,
)
from switchtitan.checkpoint.find import check_output_folder, find_checkpoint
from switchtitan.checkpoint.layout import CHECKPOINTS_FOLDER, list_step_folders
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.config.toml_text import resolved_toml
from switchtitan.data import Corpus, build_train_batches
from switchtitan.distributed.dtype import ComputeDtype, dtype_on
from switchtitan.distributed.world import device_name, device_type
from switchtitan.job.config import JobConfig
from switchtitan.observability.throughput import peak_flops_per_s
from switchtitan.training.describe import (
    comparable_identity,
    count_parameters,
    identity_without_corpus,
    run_identity,
)
from switchtitan.training.output import check_writable
from switchtitan.training.step import TrainState


@dataclass(frozen=True)
class StartPlan:
    """Where a run would start."""

    checkpoint: Path | None
    """None: a new run."""
    state: TrainState
    changes: list[str]
    """Keys that differ from the checkpoint's."""


@dataclass(frozen=True)
class DiskPlan:
    """Checkpoints to come, and the free space for them."""

    checkpoint_bytes: int
    num_saves: int
    num_more_at_most: int
    """Checkpoints more than now, at the time of the most."""
    free_bytes: int


@dataclass(frozen=True)
class RunPlan:
    """What a run would do."""

    config: JobConfig
    num_ranks: int
    parameters: dict[str, int]
    data: DataPlan
    start: StartPlan
    compute_dtype: ComputeDtype
    step: StepEstimate
    disk: DiskPlan
    device: str

    @property
    def num_steps(self) -> int:
        """Steps to come."""
        return max(0, self.config.training.steps - self.start.state.step)

    @property
    def tokens_per_step(self) -> int:
        return self.config.training.global_batch_size * self.config.data.seq_len

    @property
    def flops(self) -> int:
        """Floating-point operations of all steps to come, on all ranks."""
        per_rank = self.step.forward_backward_flops + self.step.update_flops
        return per_rank * self.num_ranks * self.num_steps

    def duration_s(self, mfu: float) -> float | None:
        """Seconds for the steps to come at this MFU; None if the device's peak is unknown.

        MFU counts the operations of full rank for every method, as in the log.
        """
        peak = peak_flops_per_s(self.device)
        if peak is None or self.compute_dtype.name != "bfloat16":
            return None
        return self.step.full_rank_flops * self.num_steps / (peak * mfu)


def plan_run(config: JobConfig, num_ranks: int) -> RunPlan:
    """Finds out what a run on `num_ranks` ranks would do; reads files and writes none.

    Raises:
        UserError: as training would, except for what it finds out later: another process that
            trains in the same folder, a rank that does not see the files, or a source that cannot
            be read.
    """
    checkpoints = config.job.output_dir / CHECKPOINTS_FOLDER
    check_writable(config.job.output_dir)
    check_given_paths(checkpoints, config.checkpoint)
    data = plan_data(config.data, config.model.vocab_size)
    start = _plan_start(config, data.corpus)
    if data.corpus is not None:
        _check_batches(config, data.corpus, num_ranks)
    device = torch.device(device_type())
    compute_dtype = dtype_on(device, config.training.dtype, start.state.compute_dtype)
    # The estimate must not choose the dtype of another device.
    training = config.training.model_copy(update={"dtype": compute_dtype.name})
    estimated = config.model_copy(update={"training": training})
    parameters, checkpoint_bytes = _measure_state(estimated, num_ranks)
    num_saves = build_schedule(config).num_saves_after(start.state.step)
    check_room(checkpoints, config.checkpoint, checkpoint_bytes, num_saves)
    return RunPlan(
        config,
        num_ranks,
        parameters,
        data,
        start,
        compute_dtype,
        estimate_step(estimated, num_ranks),
        _plan_disk(config, checkpoint_bytes, num_saves),
        device_name(device),
    )


def _plan_start(config: JobConfig, corpus: Corpus | None) -> StartPlan:
    folder = config.job.output_dir / CHECKPOINTS_FOLDER
    check_output_folder(folder, config.checkpoint.resume)
    checkpoint = find_checkpoint(folder, config.checkpoint.resume)
    if checkpoint is None:
        return StartPlan(None, TrainState(), [])
    if corpus is not None:
        identity = run_identity(config, corpus)
    else:
        saved = comparable_identity(read_metadata(checkpoint).identity)
        identity = {**identity_without_corpus(config), "corpus": saved.get("corpus")}
        check_same_run(saved, identity)
    return StartPlan(checkpoint, *read_state(checkpoint, identity, resolved_toml(config)))


def _check_batches(config: JobConfig, corpus: Corpus, num_ranks: int) -> None:
    """Checks that the splits are long enough."""
    seq_len = config.data.seq_len
    batches = build_train_batches(
        corpus.train_split(seq_len),
        seed=config.job.seed,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=0,
        num_ranks=num_ranks,
    )
    batches.close()
    corpus.held_out_split("validation", seq_len)
    if config.evaluation.test_tokens is not None:
        corpus.held_out_split("test", seq_len)


def _measure_state(config: JobConfig, num_ranks: int) -> tuple[dict[str, int], int]:
    """Returns the numbers of parameters by kind, and the bytes of a checkpoint."""
    with fake_stepper(config, num_ranks) as stepper:
        tensors = CheckpointTensors(stepper.model, stepper.optimizer)()
        return count_parameters(stepper.model), estimate_bytes(tensors.values(), num_ranks)


def _plan_disk(config: JobConfig, checkpoint_bytes: int, num_saves: int) -> DiskPlan:
    folder = config.job.output_dir / CHECKPOINTS_FOLDER
    num_present = len(list_step_folders(folder))
    num_more = (
        num_additional_checkpoints(num_present, num_saves, config.checkpoint.keep_latest)
        if num_saves
        else 0
    )
    return DiskPlan(checkpoint_bytes, num_saves, num_more, free_bytes(folder))
