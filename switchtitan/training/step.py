"""One optimizer step: batch, forward, backward, clipping and update, for any model and method."""

import logging
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from switchtitan.contracts import Batch, LanguageModel, SummedLoss, TrainingOptimizer
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.dtype import DtypeName
from switchtitan.distributed.fsdp import begin_micro_batch
from switchtitan.distributed.norms import total_norm
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import local
from switchtitan.distributed.world import World
from switchtitan.numerics.random import seed_dropout
from switchtitan.regions import STEP, region

logger = logging.getLogger(__name__)

_Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass
class TrainState:
    """The state that a run resumes from, except for tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    step: _Count = 0
    """Optimizer steps done."""
    num_skipped: _Count = 0
    """Batches whose update was skipped. Their tokens count as seen."""
    tokens_seen: _Count = 0
    first_validation_loss: float | None = None
    last_validation_loss: float | None = None
    evaluated_at: _Count | None = None
    """The step after which `last_validation_loss` was computed."""
    initial_weights: str | None = None
    """File or checkpoint of a warm start's weights."""
    initial_fingerprint: str | None = None
    """Checksum of those weights."""
    forked_from: str | None = None
    """The checkpoint or run that `[checkpoint] resume` named when this run began."""
    compute_dtype: DtypeName | None = None
    """dtype of activations and gradients."""

    @property
    def next_batch(self) -> int:
        """Index of the next global batch: the number of those read."""
        return self.step + self.num_skipped


class StepResult(NamedTuple):
    """The result of a step. Tensors are 0-dim and stay on the device."""

    loss: Tensor
    """This rank's mean loss per token."""
    grad_norm: Tensor
    """The gradient's norm over all ranks, before clipping, the same on every rank; nan if any
    rank's loss is not finite."""
    is_skipped: bool
    """Whether the update is skipped because `grad_norm` is not finite."""


@dataclass(kw_only=True, eq=False)
class Stepper:
    """Takes optimizer steps: `step`, or its parts, which benchmarks measure."""

    model: LanguageModel
    optimizer: TrainingOptimizer
    loss: SummedLoss
    """The training loss from the model's last hidden states."""
    lr_schedule: Callable[[int], float]
    """step -> factor on the peak learning rate."""
    batches: Generator[list[Batch], None, None]
    """This rank's micro-batches, one list per step, starting at `state.next_batch`."""
    world: World
    parallelism: ParallelismConfig
    """As the model was sharded."""
    seed: int
    """The job's seed; determines dropout."""
    max_grad_norm: float | None
    """Gradients are clipped to this norm; None does not clip."""
    on_nonfinite: Literal["stop", "skip"]
    """If the loss or the gradient is not finite on any rank. "stop": update; the caller stops the
    run. "skip": skip the update on all ranks; the host waits for the norm in every step."""
    state: TrainState
    """Changed in place by every step."""

    def __post_init__(self) -> None:
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._is_last_micro_batch: bool | None = None

    def step(self) -> StepResult:
        """Takes one step on one global batch; all ranks must call."""
        with region(STEP):
            result = self.compute_gradients()
            if not result.is_skipped:
                self.update()
            self.finish_step(result)
        return result

    def compute_gradients(self) -> StepResult:
        """Computes the clipped gradient of the next batch, in `grad` of every rank's shards."""
        with region("update"):
            self.optimizer.set_lr(self.lr_schedule(self.state.step))
        with region("forward"):
            # By the step, not the batch: a skipped batch does not change what follows.
            seed_dropout(self.seed, self.state.step, self.world.rank)
        with region("data"):
            micro_batches = next(self.batches)
        loss = self.forward_backward(micro_batches)
        grad_norm = self.clip_gradients(loss)
        is_skipped = self.on_nonfinite == "skip" and not bool(torch.isfinite(grad_norm))
        return StepResult(loss, grad_norm, is_skipped)

    def forward_backward(self, micro_batches: list[Batch]) -> Tensor:
        """Computes the mean gradient over all ranks; returns this rank's mean loss, 0-dim."""
        num_targets = sum(batch.targets.numel() for batch in micro_batches)
        self.state.tokens_seen += num_targets * self.world.size
        loss_sum = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            with region("data"):
                tokens, targets, document_ids = batch.to(self.world.device)
            with region("forward"):
                is_last = index == len(micro_batches) - 1
                if is_last != self._is_last_micro_batch:  # it visits all modules
                    begin_micro_batch(self.model, self.parallelism, is_last)
                    self._is_last_micro_batch = is_last
                apply_head = partial(self.loss, targets=targets, divisor=num_targets)
                loss = self.model(tokens, document_ids, apply_head)
            with region("backward"):
                loss.backward()
                loss_sum += loss.detach()
        return loss_sum

    def clip_gradients(self, loss: Tensor) -> Tensor:
        """Clips the gradients to `max_grad_norm`; returns `StepResult.grad_norm`."""
        with region("reduce"):
            gradients = [p.grad for p in self._trained if p.grad is not None]
            norm = total_norm(gradients, loss)
        with region("clip"):
            if self.max_grad_norm is not None:
                # As torch.nn.utils.clip_grads_with_norm_, which takes longer for DTensors.
                factor = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                # In their dtype: CUDA's list operations take one for all.
                shards = [local(gradient) for gradient in gradients]
                torch._foreach_mul_(shards, factor.to(shards[0].dtype))
        return norm

    def update(self) -> None:
        """Updates the weights. What a method merges, folds or projects is multiplied in fp32."""
        with region("update"), full_precision():
            self.optimizer.step()

    def finish_step(self, result: StepResult) -> None:
        """Resets the gradients, and counts the step or the skipped batch."""
        with region("update"):
            self.optimizer.zero_grad()
        if not result.is_skipped:
            self.state.step += 1
            return
        loss = float(result.loss)
        # Ranks whose own loss is not finite say so: their data or device may be the cause.
        if self.world.is_main or not math.isfinite(loss):
            logger.warning(
                "skipped the update of batch %d at step %d: loss %s on rank %d, gradient norm %s",
                self.state.next_batch,
                self.state.step,
                loss,
                self.world.rank,
                float(result.grad_norm),
            )
        self.state.num_skipped += 1

    def close(self) -> None:
        """Ends the processes that read batches."""
        self.batches.close()
