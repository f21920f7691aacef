"""Runs whose data holds a batch with numbers that are not finite, and runs without that batch."""

from pathlib import Path

import torch

from support.spoiled import leave_out_batch, spoil_batch, spoil_next_gradient, spoil_next_loss
from support.tiny import full_tensors, tiny_trainer

NUM_STEPS, BAD_BATCH = 10, 2
SKIP = ("--training.on_nonfinite", "skip")
SPOILS = {"gradient": spoil_next_gradient, "loss": spoil_next_loss}
Outcome = tuple[list[float], dict[str, torch.Tensor]]
"""The losses of all updates on this rank, and all tensors at the end."""


def outcome(
    folder: Path,
    method: str,
    *overrides: str,
    spoil: str | None = None,
    spoils_here: bool = True,
    leaves_out: bool = False,
    num_ranks: int = 1,
    num_steps: int = NUM_STEPS,
) -> Outcome:
    """Runs `num_steps` steps.

    Args:
        spoil: what of the bad batch is not finite; None for a finite one.
        spoils_here: whether on this rank.
        leaves_out: whether the data lacks that batch.
    """
    trainer = tiny_trainer(folder, method, *overrides, num_ranks=num_ranks)
    stepper, losses = trainer.stepper, []
    reader = stepper.batches
    if leaves_out:
        leave_out_batch(stepper, BAD_BATCH)
    elif spoil is not None and spoils_here:
        spoil_batch(stepper, BAD_BATCH, SPOILS[spoil])
    while stepper.state.step < num_steps:
        result = stepper.step()
        if not result.is_skipped:
            losses.append(result.loss.item())
    reader.close()
    assert stepper.state.num_skipped == (spoil is not None and "skip" in overrides)
    return losses, full_tensors(trainer)


def differing(one: Outcome, other: Outcome) -> list[str]:
    """Returns the names of what differs in any bit."""
    assert one[1].keys() == other[1].keys()
    names = [name for name, tensor in one[1].items() if not torch.equal(tensor, other[1][name])]
    return names if one[0] == other[0] else ["losses", *names]
