"""Loss over held-out batches. Changes no weight."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from switchtitan.contracts import IGNORED_TARGET, Batch, SummedLoss
from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.distributed.world import World

# Imported where they are built: most runs have no prompts, and a text is counted at the end.
if TYPE_CHECKING:
    from switchtitan.data.text import TextSize
    from switchtitan.training.prompts import Prompts


class EvaluationStopped(Exception):  # noqa: N818
    """A signal stopped the run during an evaluation."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Evaluator:
    """Computes a model's loss on the same held-out tokens in every call.

    Args:
        batches: this rank's batches, read once per evaluation. All ranks have the same number, of
            the same shape.
        read_size: returns the size of all ranks' text, which it reads; None if it is not known.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        summed_loss: SummedLoss,
        world: World,
        read_size: "Callable[[], TextSize] | None" = None,
    ) -> None:
        self._batches = batches
        self._summed_loss = summed_loss
        self._world = world
        self._read_size = read_size

    def bits_per_byte(self, loss: float) -> float | None:
        """Returns a loss of this evaluator in bits per byte; None if that is not known."""
        return None if self._read_size is None else self._read_size().bits_per_byte(loss)

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, stop_is_due: Callable[[], int | None] = lambda: None
    ) -> float:
        """Returns the mean loss per held-out token over all ranks, in nats.

        Args:
            stop_is_due: returns a signal to stop between two batches; see `Stop.is_due`.

        Raises:
            EvaluationStopped: if it does; the model is as before.
        """
        device = self._world.device
        # [sum of losses, number of targets]. fp64 keeps long sums of fp32 numbers exact enough.
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        try:
            for batch in self._batches:
                tokens, targets, document_ids = (
                    part.to(device, non_blocking=True) for part in batch
                )
                summed_loss = partial(self._summed_loss, targets=targets)
                totals[0] += model(tokens, document_ids, summed_loss)
                totals[1] += (targets != IGNORED_TARGET).sum()
                if (number := stop_is_due()) is not None:
                    raise EvaluationStopped(number)
        finally:
            model.train(was_training)
            free_gathered_weights(model)
        loss_sum, num_targets = self._world.sum(totals).tolist()
        return loss_sum / num_targets


class Evaluators(NamedTuple):
    """The evaluators by split."""

    validation: Evaluator
    test: Evaluator | None
    """Evaluates the trained model once; None without a test split."""
    prompts: "Prompts | None" = None
    """Continued after each evaluation on the validation split; None without prompts."""

    def bits_per_byte(
        self, validation_loss: float | None, test_loss: float | None
    ) -> dict[str, float | None]:
        """Returns losses of both splits in bits per byte, by tag; None if unknown.

        Reads the text of both splits, which takes seconds for many tokens.
        """
        losses = {"validation": validation_loss, "test": test_loss}
        evaluators = {"validation": self.validation, "test": self.test}
        return {
            f"bits_per_byte/{split}": None
            if loss is None or (evaluator := evaluators[split]) is None
            else evaluator.bits_per_byte(loss)
            for split, loss in losses.items()
        }
