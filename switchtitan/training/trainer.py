"""Decides when a run evaluates, saves, reports and stops, for any model and method."""

import gc
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from switchtitan.checkpoint.config import RESUME_AUTO
from switchtitan.checkpoint.save import OPTIMIZER, Checkpointer, CheckpointTensors
from switchtitan.distributed.norms import non_finite
from switchtitan.distributed.replicas import check_replicas
from switchtitan.distributed.shards import local
from switchtitan.errors import RanksDisagreeError, UserError, abbreviate
from switchtitan.observability.log import perplexity_of
from switchtitan.observability.profiler import Profiler
from switchtitan.observability.region_times import RegionTimes
from switchtitan.observability.reporter import Reporter
from switchtitan.observability.throughput import Throughput, peak_memory_gib
from switchtitan.regions import region
from switchtitan.training.evaluate import Evaluator
from switchtitan.training.step import Stepper, StepResult
from switchtitan.training.stop import Stop, Stopped
from switchtitan.workbench.spectra.weight_change import RankTelemetry

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 100
"""The run stops after this many skipped updates in a row: its weights will not recover."""


class TrainingDivergedError(UserError):
    """Losses, gradients or weights are no longer finite; the configuration was valid."""

    exit_status = 3


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains a model to the end of its run."""

    stepper: Stepper
    num_steps: int
    evaluate_interval: int
    validation: Evaluator
    test: Evaluator | None
    """Evaluates the trained model once; None without a test split."""
    checkpointer: Checkpointer
    tensors: CheckpointTensors
    reporter: Reporter
    throughput: Throughput
    profiler: Profiler
    hooks: Sequence[RankTelemetry]
    """What else to do between steps, in order, on all ranks: before evaluations and saves."""
    stop: Stop
    """When to stop before the last step."""

    def __post_init__(self) -> None:
        self._state, self._world = self.stepper.state, self.stepper.world
        self._saved_step = self._state.step
        self._has_stepped, self._has_evaluated = False, False
        self._running_loss = RunningLoss(self._world.device)
        self._region_times = RegionTimes(self._world.device)

    def train(self) -> None:
        """Takes the remaining steps; evaluates, reports and saves when due.

        Raises:
            TrainingDivergedError: if a loss, a gradient or a weight to save is not finite, or too
                many updates were skipped in a row. Nothing more is saved.
            RanksDisagreeError: if ranks no longer train the same model. Nothing more is saved.
            Stopped: by a signal, after the last step done was saved.
        """
        state = self._state
        try:
            if state.step >= self.num_steps:
                logger.info(
                    "training already complete: step %d, and [training] steps = %d; to continue, "
                    "start it with a larger --training.steps",
                    state.step,
                    self.num_steps,
                )
                # All ranks must agree.
                if self._world.on_main(lambda: self.reporter.has_results(state.step)):
                    return
            elif self.num_steps < self.evaluate_interval and state.evaluated_at is None:
                logger.info(
                    "no evaluation: the run is shorter than [evaluation] interval = %d",
                    self.evaluate_interval,
                )
            # At the start, or where a signal has stopped the evaluation.
            self._evaluate_if_due()
            group = self._world.host_group if self._world.size > 1 else None
            with self.stop.steps(self._resume_hint, self.checkpointer.config.grace_s, group):
                self._take_steps()
            self._finalize()
        except RanksDisagreeError:
            # All ranks are alive, and a save in progress has a valid state to resume from.
            self.checkpointer.finish()
            raise
        except Stopped:
            logger.info("stopped at step %d; %s", state.step, self._resume_hint())
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Ends the processes that read batches, and closes the reporter's files."""
        self.stepper.close()
        self.reporter.close()

    def evaluate(self) -> None:
        """Reports the validation loss."""
        self._stop_if_diverged()
        state = self._state
        with self.throughput.excluded(), region("evaluate"):
            self._set_timeout(is_first=not self._has_evaluated)
            loss = self.validation(self.stepper.model, self.stop.raise_if_due)
            self._has_evaluated = True
            self._set_timeout(is_first=False)
        if state.first_validation_loss is None:
            state.first_validation_loss = loss
        state.last_validation_loss, state.evaluated_at = loss, state.step
        values = {"loss/validation": loss, "perplexity/validation": perplexity_of(loss)}
        self.reporter.report(state.step, values)

    def save(self) -> None:
        """Saves a checkpoint, in the background if configured so."""
        self._stop_if_diverged()
        state = self._state
        with self.throughput.excluded(), region("save"):
            tensors = self.tensors()
            self.check_ranks(tensors)
            # A finite gradient can still overflow a weight.
            if names := non_finite(self.tensors.model, self._world.device):
                raise self._divergence(
                    f"weights are not finite at step {state.step} ({abbreviate(names)})"
                )
            self.checkpointer.save(state.step, tensors, asdict(state))
        self._saved_step = state.step

    def check_ranks(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Compares all that ranks hold alike, the numbers that determine the next step included.
        Raises a RanksDisagreeError on every rank if ranks differ. `tensors` is what `self.tensors`
        returned, since the state of some optimizers takes time."""
        if self._world.size == 1:
            return
        state = self._state
        numbers = {
            "training.step": state.step,
            "training.batches_skipped": state.num_skipped,
            "training.tokens_seen": state.tokens_seen,
            "training.lr_factor": self.stepper.lr_schedule(state.step),
        }
        alike = {name: torch.tensor(number) for name, number in numbers.items()}
        replicated = self.stepper.optimizer.replicated()
        alike |= {f"{OPTIMIZER}{name}": tensor for name, tensor in replicated.items()}
        check_replicas({**(tensors or self.tensors()), **alike}, self._world.device)

    def _take_steps(self) -> None:
        """Takes steps until the last one or the stop, and completes the save of that step."""
        state = self._state
        skipped_in_a_row = 0
        with self._region_times, self.profiler:
            try:
                while state.step < self.num_steps:
                    result = self.stepper.step()
                    skipped_in_a_row = skipped_in_a_row + 1 if result.is_skipped else 0
                    if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                        raise self._divergence(
                            f"skipped {skipped_in_a_row} updates in a row at step {state.step}, "
                            "since losses or gradients were not finite"
                        )
                    if not result.is_skipped:
                        self._after_step(result)
                    if not self._has_stepped:
                        self._has_stepped = True
                        self._set_timeout(is_first=False)
                        # Otherwise Python's collector visits all objects that torch.compile leaves,
                        # for 0.25 s in a step, and the other ranks wait.
                        gc.collect()
                        gc.freeze()
                    if state.step < self.num_steps:
                        self.stop.raise_if_due()
            except Stopped:
                self._save_last_step()
                raise
            finally:
                gc.unfreeze()
        self._world.together(lambda: None)  # a trace may have been written at the end
        self._save_last_step()

    def _set_timeout(self, is_first: bool) -> None:
        """Lets ranks wait for each other longer in what is done first, which they compile."""
        keys, is_long = self.stepper.parallelism, is_first or not self._has_stepped
        timeout_s = keys.timeout_s if is_long else keys.step_timeout_s
        if timeout_s != self._world.timeout.total_seconds():
            self._world.set_timeout(timeout_s)

    def _after_step(self, result: StepResult) -> None:
        """Does what is due after an update; not after skipped batches: the step did not advance."""
        step = self._state.step
        self._running_loss.add(result)
        is_slow = self.profiler.is_slow_next
        with self.throughput.excluded() if is_slow else nullcontext():
            self.profiler.step()
            if is_slow:
                self._world.together(lambda: None)  # ranks that write nothing wait
        self.checkpointer.poll(step)
        self.reporter.advance(step)
        check_interval = self.stepper.parallelism.check_interval
        if check_interval and step % check_interval == 0:
            with self.throughput.excluded():
                self.check_ranks()
        if self.reporter.is_due(step):
            with region("report"):
                self._report(result.grad_norm)
        for hook in self.hooks:
            if hook.is_due(step):
                self._stop_if_diverged()
                with self.throughput.excluded():
                    hook.after(step, self.reporter)
        # After the hooks: a signal can stop it, and the resumed run then does it alone.
        self._evaluate_if_due()
        if step == self.num_steps or step % self.checkpointer.config.interval == 0:
            self.save()

    def _evaluate_if_due(self) -> None:
        """Evaluates the weights at the start, every `evaluate_interval` steps and at the end."""
        state = self._state
        is_due = state.step % self.evaluate_interval == 0 or state.step >= self.num_steps
        # A shorter run is not evaluated, unless it was before: its results would state that loss.
        is_evaluated = self.num_steps >= self.evaluate_interval or state.evaluated_at is not None
        if is_due and is_evaluated and state.evaluated_at != state.step:
            self.evaluate()

    def _save_last_step(self) -> None:
        """Saves the step at which the run ends, unless it is saved; waits for the save."""
        if self._state.step != self._saved_step:
            self.save()
        self.checkpointer.finish()

    def _report(self, grad_norm: Tensor) -> None:
        self._stop_if_diverged()
        state, world = self._state, self._world
        world.synchronize()
        values = {
            "loss/train": (world.sum(self._running_loss.take_mean()) / world.size).item(),
            "optimizer/grad_norm": grad_norm.item(),
            **self.stepper.optimizer.metrics(),
            **self.throughput.measure(state.step),
            "memory/peak_gib": peak_memory_gib(world.device),
            "data/tokens_seen": float(state.tokens_seen),
            "data/batches_skipped": float(state.num_skipped),
            **self._region_times.means(),
        }
        self.reporter.report(state.step, values)

    def _finalize(self) -> None:
        """Evaluates on the test split and writes the results; again if it was stopped before."""
        state, device = self._state, self._world.device
        test, test_loss = self.test, None
        if test is not None:
            test_loss = test(self.stepper.model)
            tested = {"loss/test": test_loss, "perplexity/test": perplexity_of(test_loss)}
            self.reporter.report(state.step, tested)
        shards = map(local, self.tensors().values())
        on_device = (shard for shard in shards if shard.device.type == device.type)
        values: dict[str, float | None] = {
            "step": state.step,
            "tokens_seen": state.tokens_seen,
            "batches_skipped": state.num_skipped,
            **self.throughput.means(),
            "memory/peak_gib": peak_memory_gib(device),
            "memory/state_gib": sum(shard.nbytes for shard in on_device) / 2**30,
        }
        for split, evaluator, loss in (
            ("validation", self.validation, state.last_validation_loss),
            ("test", test, test_loss),
        ):
            bits = None if evaluator is None else evaluator.bits_per_byte(loss)
            values |= {f"loss/{split}": loss, f"bits_per_byte/{split}": bits}
        # The times of the last evaluation and save.
        if last_values := self._region_times.means():
            self.reporter.report(state.step, last_values)
        self.reporter.summary(
            values,
            first_validation_loss=state.first_validation_loss,
            checkpoint=self.checkpointer.latest,
            trace=self.profiler.trace,
        )

    def _resume_hint(self) -> str:
        checkpoint = self.checkpointer.latest
        if checkpoint is None:
            return "there is no checkpoint yet; the same command starts from scratch"
        is_auto = self.checkpointer.config.resume == RESUME_AUTO
        option = "" if is_auto else " with --checkpoint.resume auto"
        return f"the same command{option} resumes from {checkpoint}"

    def _stop_if_diverged(self) -> None:
        if not self._running_loss.all_finite:
            raise self._divergence(
                f"a loss or a gradient was not finite by step {self._state.step}",
                "lower [optimizer] lr, increase [lr_schedule] warmup_steps, or set [training] "
                'on_nonfinite = "skip"',
            )

    def _divergence(
        self, reason: str, advice: str = "lower [optimizer] lr and resume"
    ) -> TrainingDivergedError:
        """Writes results, and returns the error to raise. Collective: waits for a save."""
        self.checkpointer.finish()
        self.reporter.report_divergence(self._state.step, self._state.num_skipped)
        newest = self.checkpointer.latest
        good = f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return TrainingDivergedError(f"{reason}; {good}; {advice}")


class RunningLoss:
    """The mean loss of several steps, and whether their gradients were finite, kept on the device:
    reading them in every step would make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._loss_sum = torch.zeros((), device=device)
        self._num_steps = 0
        self._all_finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, result: StepResult) -> None:
        """Counts a step that was not skipped."""
        self._loss_sum += result.loss
        self._num_steps += 1
        self._all_finite &= torch.isfinite(result.grad_norm)

    @property
    def all_finite(self) -> bool:
        """Whether all gradients so far were finite. Waits for the device."""
        return bool(self._all_finite)

    def take_mean(self) -> Tensor:
        """Returns this rank's mean loss since the last call, 0-dim."""
        mean = self._loss_sum / self._num_steps
        self._loss_sum.zero_()
        self._num_steps = 0
        return mean
