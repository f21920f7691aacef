"""When a run resets, and how a reset changes a layer and the moments of its factors.

The functions work on plain tensors and on DTensors, with equal results: every rank gathers one full
tensor at a time. All ranks must call.
"""

import torch
from torch import Tensor

from switchtitan.distributed.host_copies import to_device
from switchtitan.distributed.shards import copy_from_full_, full_tensor, local, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.lowrank.linear import lora_bound, uniform
from switchtitan.methods.lowrank.rounding import Rounding, add_product_


class ResetSchedule:
    """Counts a run's steps and resets.

    A reset follows every `interval`-th step except the last of the run (ReLoRA, arXiv 2307.05695,
    Algorithm 1).

    Args:
        interval: steps between two resets.
        warmup_steps: steps of the learning rate's warm-up after a reset.
        num_steps: length of the run.

    Attributes:
        num_resets: resets so far.
    """

    def __init__(self, interval: int, warmup_steps: int, num_steps: int) -> None:
        self._interval, self._warmup_steps, self._num_steps = interval, warmup_steps, num_steps
        self._steps_done = 0
        self.num_resets = 0
        # Not derived from the number of steps: a run extended later had no reset at its first end.
        self._last_reset_step = 0

    def lr_factor(self) -> float:
        """Returns the next step's warm-up factor: (steps since the reset + 1) / warmup_steps, at
        most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a
        reset has a learning rate of zero. Here it is above zero, as in the warm-up at the start of
        a run, so that no step is without effect.
        """
        if self.num_resets == 0:
            return 1.0
        return min(1.0, (self._steps_done - self._last_reset_step + 1) / max(1, self._warmup_steps))

    def advance(self) -> bool:
        """Counts a step, and the reset that follows it; returns whether there is one."""
        self._steps_done += 1
        if self._steps_done % self._interval or self._steps_done >= self._num_steps:
            return False
        self.num_resets += 1
        self._last_reset_step = self._steps_done
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the counts as 0-dim int64 tensors."""
        return {
            "steps_done": torch.tensor(self._steps_done),
            "num_resets": torch.tensor(self.num_resets),
            "last_reset_step": torch.tensor(self._last_reset_step),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps_done = int(state["steps_done"])
        self.num_resets = int(state["num_resets"])
        self._last_reset_step = int(state["last_reset_step"])


@torch.no_grad()
def merge_and_restart_(
    layer: LowRankLinear, generator: torch.Generator, rounding: Rounding | None = None
) -> None:
    """Adds s B A to W, draws A as at initialization, and zeroes B. The layer's output does not
    change.

    (ReLoRA, arXiv 2307.05695, Algorithm 1.) A is random because with A and B at zero, neither would
    get a gradient.

    Args:
        generator: draws A, uniform within `lora_bound`; in the same state on every rank.
        rounding: for a weight in bf16; the layer's output is then unchanged in expectation.
    """
    held = row_range(layer.weight)
    lora_b = full_tensor(layer.lora_b)[:, held.start : held.stop]
    add_product_(local(layer.weight), lora_b.t(), full_tensor(layer.lora_a), layer.scale, rounding)
    shape = layer.rank, layer.in_features
    new_a = uniform(shape, lora_bound(layer.in_features), generator)
    copy_from_full_(layer.lora_a, to_device(new_a, layer.lora_a.device))
    local(layer.lora_b).zero_()


@torch.no_grad()
def prune_by_magnitude_(exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float) -> None:
    """Zeroes the smallest values of both moments, and first moments whose second moment is zeroed.

    The authors' code prunes the moments independently. But A's first gradient after a reset is
    zero, since B is: with only the second moment zeroed, Adam would divide the old first moment by
    eps, an update at least ten thousand times too large.

    Args:
        exp_avg, exp_avg_sq: [rows, width], changed in place. `num_pruned` second moments are
            zeroed, and at least as many first moments.
    """
    means, squares = full_tensor(exp_avg), full_tensor(exp_avg_sq)
    keep = largest(squares, prune_ratio)
    copy_from_full_(exp_avg_sq, torch.where(keep, squares, 0))
    copy_from_full_(exp_avg, torch.where(keep & largest(means.abs(), prune_ratio), means, 0))


@torch.no_grad()
def prune_at_random_(
    exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float, generator: torch.Generator
) -> None:
    """Zeroes `num_pruned` values of both moments at the same random places.

    The same in both, for the reason in `prune_by_magnitude_`.

    Args:
        exp_avg, exp_avg_sq: [rows, width], changed in place.
        generator: on the CPU; in the same state on every rank.
    """
    keep = to_device(
        largest(torch.rand(exp_avg.shape, generator=generator), prune_ratio), exp_avg.device
    )
    for moment in (exp_avg, exp_avg_sq):
        copy_from_full_(moment, torch.where(keep, full_tensor(moment), 0))


def largest(scores: Tensor, prune_ratio: float) -> Tensor:
    """Returns a mask of all but the `num_pruned` smallest scores; of equal ones, the first.

    Returns:
        bool, shaped like `scores`.
    """
    # A stable sort: with a threshold, ties would change the count, and ranks must agree on which.
    order = scores.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    # Not `keep[order] = True`, which copies a number from the host and synchronizes.
    keep.index_fill_(0, order[: scores.numel() - num_pruned(scores.numel(), prune_ratio)], True)
    return keep.view(scores.shape)


def num_pruned(num_values: int, prune_ratio: float) -> int:
    """Returns the number of values to zero: `prune_ratio * num_values`, rounded."""
    return round(prune_ratio * num_values)
