"""Loss over held-out batches. Changes no weight."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from switchtitan.contracts import IGNORED_TARGET, Batch, SummedLoss
from switchtitan.data.tokenizer import TextSize
from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.distributed.world import World


@dataclass(eq=False)
class Evaluator:
    """Computes a model's loss on the same held-out tokens in every call."""

    batches: Iterable[Batch]
    """This rank's, read once per evaluation. All ranks have the same number, of the same shape."""
    summed_loss: SummedLoss
    world: World
    read_size: Callable[[], TextSize] | None = None
    """Reads and returns the size of all ranks' text; None if it is not known."""

    def bits_per_byte(self, loss: float | None) -> float | None:
        """Returns a loss in bits per byte; takes seconds for many tokens. None if unknown, and on
        other ranks than the main one, which write no results."""
        if loss is None or self.read_size is None or not self.world.is_main:
            return None
        return self.read_size().bits_per_byte(loss)

    @torch.no_grad()
    def __call__(self, model: nn.Module, after_batch: Callable[[], object] = lambda: None) -> float:
        """Returns the mean loss per held-out token over all ranks, in nats. `after_batch` may
        raise, e.g. to stop; the model is as before."""
        device = self.world.device
        # [sum of losses, number of targets]. fp64 keeps long sums of fp32 numbers exact enough.
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        try:
            for batch in self.batches:
                tokens, targets, document_ids = batch.to(device)
                apply_head = partial(self.summed_loss, targets=targets)
                totals[0] += model(tokens, document_ids, apply_head)
                totals[1] += (targets != IGNORED_TARGET).sum()
                after_batch()
        finally:
            model.train(was_training)
            free_gathered_weights(model)
        loss_sum, num_targets = self.world.sum(totals).tolist()
        return loss_sum / num_targets
