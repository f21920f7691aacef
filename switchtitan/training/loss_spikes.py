"""Finds loss spikes, and takes a run back to its last checkpoint without the batches that caused
them."""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.checkpoint import Checkpointer, read_metadata
from switchtitan.checkpoint.load import CheckpointTensors
from switchtitan.checkpoint.verify import check_contents
from switchtitan.contracts import Batch
from switchtitan.errors import CheckpointError
from switchtitan.job.sections import LossSpikeConfig
from switchtitan.training.divergence import divergence
from switchtitan.training.stepper import Stepper, StepResult, TrainState

logger = logging.getLogger(__name__)

_MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_DEVIATION = 1e-3
"""The least deviation as a fraction of the median, for losses that are almost constant."""


class LossSpike(NamedTuple):
    """A step whose loss is a spike."""

    step: int
    """Steps done, this one included."""
    position: int
    """Number of batches read before its batch."""
    batch: int
    """Index of its batch in the data."""
    loss: float
    """Mean over all ranks; nan if a loss or the gradient was not finite."""
    limit: float

    def __str__(self) -> str:
        limit = f", above {self.limit:.4f}," if math.isfinite(self.limit) else ""
        return f"loss spike at step {self.step}: {self.loss:.4f}{limit} in batch {self.batch}"


class LossSpikeGuard:
    """Compares the loss of every step with those of the steps before it, and rolls the run back.

    Losses stay on the device until `has_rolled_back`, which sums them over ranks in one message.
    What it does depends on the losses and their order, not on when it is called, since it passes
    over a fixed number of batches: a resumed run does the same.

    Args:
        open_batches: returns this rank's batches from the position of the stepper's state.
    """

    def __init__(
        self,
        config: LossSpikeConfig,
        stepper: Stepper,
        tensors: CheckpointTensors,
        checkpointer: Checkpointer,
        open_batches: Callable[[], Generator[list[Batch], None, None]],
    ) -> None:
        assert config.factor is not None
        self._config, self._factor = config, config.factor
        self._stepper = stepper
        self._tensors = tensors
        self._checkpointer = checkpointer
        self._open_batches = open_batches
        self._added: list[tuple[int, int]] = []
        """Step and position of each loss."""
        self._losses: list[Tensor] = []
        self._read: deque[tuple[int, int, float]] = deque()

    def add(self, result: StepResult) -> None:
        """Adds the step just taken; does not wait for the device."""
        state = self._stepper.state
        self._added.append((state.step, state.num_batches - 1))
        # The norm is nan on all ranks if a loss or the gradient is not finite.
        self._losses.append(result.loss + result.grad_norm * 0)

    def has_rolled_back(self) -> bool:
        """Rolls back if there was a spike among the steps added so far; returns whether it did.

        Waits for the device. Collective: all ranks judge the same sums over ranks, so they do the
        same.

        Raises:
            TrainingDivergedError: if the run has had as many rollbacks as it may have.
            CheckpointError: on every rank, if the checkpoint is damaged or missing.
        """
        for spike in self._spikes():
            logger.warning("%s", spike)
            num_rollbacks = self._stepper.state.num_rollbacks
            if num_rollbacks >= self._config.max_rollbacks:
                raise divergence(
                    f"{spike} after {num_rollbacks} rollbacks",
                    "lower [optimizer] lr, or increase [loss_spike] max_rollbacks or "
                    "batches_before, and resume",
                    self._checkpointer,
                )
            if self._roll_back(spike):
                return True
        return False

    def _spikes(self) -> Iterator[LossSpike]:
        if self._losses:
            losses = self._stepper.world.mean(torch.stack(self._losses)).tolist()
            self._read += ((*place, loss) for place, loss in zip(self._added, losses, strict=True))
            self._added, self._losses = [], []
        state = self._stepper.state
        recent = state.recent_losses
        while self._read:
            step, position, loss = self._read.popleft()
            is_full = len(recent) >= self._config.window
            limit = loss_limit(recent, self._factor) if is_full else math.inf
            if math.isfinite(loss):
                recent.append(loss)
                del recent[: -self._config.window]
            if not loss <= limit:
                yield LossSpike(step, position, state.batch_index(position), loss, limit)

    def _roll_back(self, spike: LossSpike) -> bool:
        """Restores model, optimizer and state from the last checkpoint, and reopens the data
        without the spike's batches; returns whether there was a checkpoint."""
        self._checkpointer.finish()
        checkpoint = self._checkpointer.resume_point
        if checkpoint is None:
            logger.warning("cannot roll back: there is no checkpoint yet")
            return False
        stepper, state = self._stepper, self._stepper.state
        world = stepper.world
        world.together(lambda: _check_undamaged(checkpoint) if world.is_main else None)
        saved = TrainState(**read_metadata(checkpoint).train_state)  # type: ignore[arg-type]
        # Earlier batches are in the checkpoint's weights.
        before = max(spike.position - self._config.batches_before, saved.num_batches)
        first, last = state.batch_index(before), spike.batch + self._config.batches_after
        saved.passed_over = sorted({*state.passed_over, *range(first, last + 1)})
        saved.num_rollbacks = state.num_rollbacks + 1
        saved.compute_dtype = state.compute_dtype
        self._tensors.restore(checkpoint)
        for field in dataclasses.fields(saved):
            setattr(state, field.name, getattr(saved, field.name))
        self._read.clear()
        stepper.close()
        stepper.batches = self._open_batches()
        logger.warning("rolled back to %s; passing over batches %d to %d", checkpoint, first, last)
        return True


def _check_undamaged(checkpoint: Path) -> None:
    # Files may change after a save has read them back.
    try:
        check_contents(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f"cannot roll back after a loss spike: {error}; the same command resumes from the "
            "newest complete checkpoint, if there is one"
        ) from error


def loss_limit(recent: list[float], factor: float) -> float:
    """Returns median + factor * deviation of the losses: above it, a loss is a spike.

    The deviation is the scaled median absolute one, and at least a thousandth of the median.
    """
    middle = median(recent)
    deviation = _MAD_TO_DEVIATION * median(abs(loss - middle) for loss in recent)
    return middle + factor * max(deviation, _LEAST_DEVIATION * abs(middle))
