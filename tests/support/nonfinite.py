"""Losses and gradients that are not finite, and runs without the batches that have them."""

import math
from itertools import count

import torch

from support.tiny import full_tensors, tiny_trainer

NUM_STEPS, BAD_BATCH = 10, 2
SKIP = ("--training.on_nonfinite", "skip")
# Both infinities; then nan as CUDA makes it, with its sign set, and as the CPU makes it.
_PATTERNS = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000]
NOT_FINITE = torch.tensor(_PATTERNS).int().view(torch.float32)


def spoil_next_gradient(stepper):
    """Makes only the next micro-batch's loss inf, like an overflow."""
    _change_next_loss(stepper, lambda loss: loss * math.inf)


def spoil_next_loss(stepper):
    """Makes only the next micro-batch's loss nan; its gradient is finite."""
    _change_next_loss(stepper, lambda loss: loss + math.nan)


SPOILS = {"gradient": spoil_next_gradient, "loss": spoil_next_loss}


def _change_next_loss(stepper, change):
    loss = stepper.loss

    def changed(*args, **kwargs):
        stepper.loss = loss
        return change(loss(*args, **kwargs))

    stepper.loss = changed


def _with_a_bad_one(batches, stepper, spoil):
    """The batches; calls `spoil` before `BAD_BATCH`, or leaves it out for None."""
    for number in count():
        batch = next(batches)
        if number != BAD_BATCH:
            yield batch
        elif spoil is not None:
            spoil(stepper)
            yield batch


def outcome(
    folder,
    method,
    *overrides,
    spoil=None,
    spoils_here=True,
    leaves_out=False,
    num_ranks=1,
    num_steps=NUM_STEPS,
):
    """Runs steps; returns all tensors at the end, and the losses of all updates on this rank.

    Args:
        spoil: what of the bad batch is not finite; None for a finite one.
        spoils_here: whether on this rank.
        leaves_out: whether the data lacks that batch.
    """
    trainer = tiny_trainer(folder, method, *overrides, num_ranks=num_ranks)
    stepper, losses = trainer.stepper, []
    reader = stepper.batches
    if leaves_out or (spoil is not None and spoils_here):
        stepper.batches = _with_a_bad_one(reader, stepper, SPOILS.get(spoil))
    while stepper.state.step < num_steps:
        result = stepper.step()
        if not result.is_skipped:
            losses.append(result.loss.item())
    reader.close()
    assert stepper.state.num_skipped == (spoil is not None and "skip" in overrides)
    return full_tensors(trainer) | {"losses": torch.tensor(losses)}
