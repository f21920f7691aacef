"""The training loop and the step. Receives its parts and builds none; knows no method and no model."""

import logging
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from switchtitan.checkpoint import Checkpointer
from switchtitan.contracts import Batch, LanguageModel, SummedLoss, TrainingOptimizer
from switchtitan.distributed.fsdp import accumulate_gradients, num_device_bytes
from switchtitan.distributed.seeds import seed_dropout
from switchtitan.distributed.world import World
from switchtitan.errors import RanksDisagreeError, UserError
from switchtitan.job.sections import TrainingConfig
from switchtitan.observability import Profiler, Reporter, StepCommunication, Throughput, peak_memory_gib
from switchtitan.observability.console import perplexity_of
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.garbage import GarbageCollection
from switchtitan.training.state import TrainState

logger = logging.getLogger(__name__)


MAX_SKIPPED_IN_A_ROW = 100
"""After so many skipped updates in a row, weights are beyond saving and the run stops."""


class TrainingDivergedError(UserError):
    """Gradients are no longer finite numbers."""

    exit_status = 3
    """Tells programs that run training that the configuration was sound."""


class StepResult(NamedTuple):
    """What a step leaves on the device."""

    loss: Tensor
    """0-dim: this rank's mean loss per token."""
    grad_norm: Tensor
    """0-dim: the gradient's norm over all ranks, before clipping."""


@dataclass(frozen=True)
class Intervals:
    """How often, in steps."""

    evaluate: int
    save: int
    inspect: int | None


class Trainer:
    """Trains a model to the end of its run.

    Args:
        seed: of the job; dropout follows from it.
        lr_schedule: step -> factor on the peak learning rate.
        batches: this rank's micro-batches, one list for each step, from `state.num_batches` on.
        test_evaluator: for the one evaluation of the trained model on the test split, if it is wanted.
        inspect_weights: reports what it finds in the weights, given the model, the step and where to report; called at its
            interval and after the last step, if it is wanted.
        tensors: all that a checkpoint holds, by name, given the optimizer's state of the moment.
        check_replicas: raises a RanksDisagreeError if ranks no longer hold the same weights; called on every rank, before
            evaluations and saves.
    """

    def __init__(
        self,
        *,
        training: TrainingConfig,
        intervals: Intervals,
        world: World,
        seed: int,
        model: LanguageModel,
        optimizer: TrainingOptimizer,
        summed_loss: SummedLoss,
        lr_schedule: Callable[[int], float],
        batches: Generator[list[Batch], None, None],
        evaluator: Evaluator,
        test_evaluator: Evaluator | None,
        inspect_weights: Callable[[nn.Module, int, Reporter], None] | None,
        checkpointer: Checkpointer,
        tensors: Callable[[], dict[str, Tensor]],
        check_replicas: Callable[[], None],
        reporter: Reporter,
        communication: StepCommunication,
        throughput: Throughput,
        profiler: Profiler,
        state: TrainState,
    ) -> None:
        self.training, self.intervals, self.world = training, intervals, world
        self.seed = seed
        self.model, self.optimizer, self.summed_loss, self.lr_schedule = (
            model,
            optimizer,
            summed_loss,
            lr_schedule,
        )
        self.batches, self.evaluator, self.test_evaluator = batches, evaluator, test_evaluator
        self.inspect_weights = inspect_weights
        self.checkpointer, self.tensors = checkpointer, tensors
        self.check_replicas = check_replicas
        self.reporter, self.communication = reporter, communication
        self.throughput, self.profiler = throughput, profiler
        self.state = state
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Sums since the last report and flags stay on the device: reading them would make the host wait in every step.
        self._loss_sum = torch.zeros((), device=world.device)
        self._all_finite = torch.ones((), dtype=torch.bool, device=world.device)
        self._num_unreported = 0

    def train(self) -> None:
        """Runs the steps that are left, and evaluates, reports and saves when it is time.

        Raises:
            TrainingDivergedError: if a gradient is not finite and such steps are not to be skipped; nothing is saved then.
            RanksDisagreeError: if ranks no longer train one model; nothing is saved then either.
        """
        try:
            self._train_what_is_left()
        finally:
            self.batches.close()
            self.reporter.close()

    def _train_what_is_left(self) -> None:
        if self.state.step >= self.training.steps:
            logger.info(
                "nothing left to train: %d of %d steps are done; raise [training] steps to go on",
                self.state.step,
                self.training.steps,
            )
            # All ranks must take the same way.
            if not self.world.broadcast(self.reporter.has_results(self.state.step)):
                self._conclude()
            return
        if self.training.steps < self.intervals.evaluate:
            logger.info(
                "no evaluation: the run is shorter than [evaluation] interval = %d", self.intervals.evaluate
            )
        elif self.state.step == 0:
            self._evaluate()
        try:
            self._run_steps()
            self.checkpointer.finish()
        except (TrainingDivergedError, RanksDisagreeError, KeyboardInterrupt) as error:
            # All ranks are alive: a save under way is of a good state, and the run goes on from it.
            self.checkpointer.finish()
            if isinstance(error, TrainingDivergedError):
                self.reporter.report_divergence(self.state.step)
            if isinstance(error, KeyboardInterrupt):
                self._say_where_it_stopped()
            raise
        self._conclude()

    def _say_where_it_stopped(self) -> None:
        checkpoint = self.checkpointer.goes_on_from
        logger.info(
            "stopped at step %d; the same command %s",
            self.state.step,
            "starts anew, since nothing was saved yet"
            if checkpoint is None
            else f"goes on from {checkpoint}",
        )

    def _conclude(self) -> None:
        """The test split's evaluation and the summary; a run that was stopped before them makes up for them."""
        test_loss = None if self.test_evaluator is None else self.test_evaluator(self.model)
        if test_loss is not None:
            self.reporter.report(self.state.step, loss_metrics("test", test_loss))
        tensors = self.tensors().values()
        self.reporter.summary(
            {
                "step": self.state.step,
                "tokens_seen": self.state.tokens_seen,
                "loss/validation": self.state.last_validation_loss,
                "loss/test": test_loss,
                "throughput/tokens_per_s": self.throughput.mean_tokens_per_s or None,
                "throughput/wall_time_s": self.throughput.wall_time_s,
                "communication/mib_per_step": self.communication.mib_per_step,
                "memory/peak_gib": peak_memory_gib(self.world.device),
                "memory/state_gib": num_device_bytes(tensors, self.world.device) / 2**30,
            },
            checkpoint=self.checkpointer.latest,
            trace=self.profiler.trace,
        )

    def _run_steps(self) -> None:
        skipped_in_a_row = 0
        with self.profiler, GarbageCollection() as garbage:
            while self.state.step < self.training.steps:
                num_skipped = self.state.num_skipped
                with self.communication.counted(self.state.step + 1):
                    result = self.train_step()
                garbage.step()
                if self.state.num_skipped > num_skipped:
                    # Nothing is due now that was not done when this step was reached.
                    skipped_in_a_row += 1
                    if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                        raise TrainingDivergedError(
                            f"the updates of {skipped_in_a_row} batches in a row were skipped at step {self.state.step}, since "
                            "their gradients were not finite; lower [optimizer] lr and resume from the newest checkpoint"
                        )
                    continue
                skipped_in_a_row = 0
                with self.throughput.excluded():
                    self.profiler.step()
                self._after_step(result.grad_norm)

    def train_step(self) -> StepResult:
        """One step of all ranks: a global batch, an update."""
        self.optimizer.set_lr(self.lr_schedule(self.state.step))
        seed_dropout(self.seed, self.state.num_batches, self.world.rank)
        loss = self._forward_backward(next(self.batches))
        grad_norm = self._clip_gradients()
        if self.training.on_nonfinite == "skip" and not bool(torch.isfinite(grad_norm)):
            logger.warning(
                "Skipped an update at step %d: the gradient's norm is %s", self.state.step, float(grad_norm)
            )
            self.optimizer.zero_grad()
            self.state.num_skipped += 1
            return StepResult(loss, grad_norm)
        self._loss_sum += loss
        self._num_unreported += 1
        self._all_finite &= torch.isfinite(grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        return StepResult(loss, grad_norm)

    def _forward_backward(self, micro_batches: list[Batch]) -> Tensor:
        """Leaves this step's mean gradient on every rank's shards; returns this rank's mean loss, 0-dim."""
        num_targets = sum(batch.targets.numel() for batch in micro_batches)
        self.state.tokens_seen += num_targets * self.world.size
        loss_sum = torch.zeros((), device=self.world.device)
        for index, batch in enumerate(micro_batches):
            accumulate_gradients(self.model, is_last_micro_batch=index == len(micro_batches) - 1)
            tokens, targets, document_ids = (part.to(self.world.device, non_blocking=True) for part in batch)
            apply_head = partial(self.summed_loss, targets=targets, divisor=num_targets)
            loss = self.model(tokens, document_ids, apply_head)
            loss.backward()
            loss_sum += loss.detach()
        return loss_sum

    def _clip_gradients(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.world.num_replicas > 1:
            # Replicas may have summed in different orders; clipped by different bits, they would drift apart.
            norm = self.world.mean(norm)
        if self.training.max_grad_norm is not None:
            clip_grads_with_norm_(self._trained, self.training.max_grad_norm, norm)
        return norm

    def _after_step(self, grad_norm: Tensor) -> None:
        step, is_last = self.state.step, self.state.step == self.training.steps
        self.checkpointer.poll()
        self.reporter.advance(step)
        self.communication.report(step)
        if self.reporter.is_due(step):
            self._report(grad_norm)
        if step % self.intervals.evaluate == 0 or (is_last and step > self.intervals.evaluate):
            self._evaluate()
        if self.intervals.inspect is not None and (is_last or step % self.intervals.inspect == 0):
            self._inspect()
        if is_last or step % self.intervals.save == 0:
            self._save()

    def _report(self, grad_norm: Tensor) -> None:
        self._stop_if_diverged()
        self.world.synchronize()
        loss = self.world.mean(self._loss_sum / self._num_unreported).item()
        measured = self.throughput.measure(self.state.step)
        values = {"loss/train": loss, "optimizer/grad_norm": grad_norm.item()}
        values |= self.optimizer.metrics() | measured
        values |= {
            "memory/peak_gib": peak_memory_gib(self.world.device),
            "data/tokens_seen": float(self.state.tokens_seen),
        }
        self.reporter.report(self.state.step, values)
        self._loss_sum.zero_()
        self._num_unreported = 0

    def _evaluate(self) -> None:
        self._stop_if_diverged()
        with self.throughput.excluded():
            self.check_replicas()
            loss = self.evaluator(self.model)
        if self.state.first_validation_loss is None:
            self.state.first_validation_loss = loss
        self.state.last_validation_loss = loss
        self.reporter.report(self.state.step, loss_metrics("validation", loss))

    def _inspect(self) -> None:
        assert self.inspect_weights is not None
        self._stop_if_diverged()
        with self.throughput.excluded():
            self.inspect_weights(self.model, self.state.step, self.reporter)

    def _save(self) -> None:
        self._stop_if_diverged()
        with self.throughput.excluded():
            self.check_replicas()
            self.checkpointer.save(self.state.step, self.tensors(), asdict(self.state))

    def _stop_if_diverged(self) -> None:
        if not bool(self._all_finite):
            raise TrainingDivergedError(
                f"a gradient was not finite in the steps up to {self.state.step}; the newest checkpoint is from before. Lower "
                '[optimizer] lr, lengthen [lr_schedule] warmup_steps, or set [training] on_nonfinite = "skip"'
            )


def loss_metrics(split: str, loss: float) -> dict[str, float]:
    """By TensorBoard tag: the mean loss per token of a split, in nats, and the perplexity that it means."""
    return {f"loss/{split}": loss, f"perplexity/{split}": perplexity_of(loss)}
