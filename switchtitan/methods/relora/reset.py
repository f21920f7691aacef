"""When a run resets, and what a reset does to a layer and to the moments of its factors.

The functions work on plain tensors and on shards, with equal results: what depends on a full tensor is
computed from the full tensor on every rank, one tensor at a time. All ranks must call.
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

    A reset follows every `interval`-th step except the last of the run. (ReLoRA, arXiv 2307.05695, Algorithm 1.)

    Args:
        interval: steps between two resets.
        warmup_steps: over which the learning rate recovers from one.
        num_steps: length of the run.

    Attributes:
        num_resets: so far.
    """

    def __init__(self, interval: int, warmup_steps: int, num_steps: int) -> None:
        self._interval, self._warmup_steps, self._num_steps = interval, warmup_steps, num_steps
        self._steps_done = 0
        self.num_resets = 0
        # Not derived from the number of steps: a run that is made longer has no reset where it first ended.
        self._last_reset_step = 0

    def lr_factor(self) -> float:
        """The factor on the learning rate at the coming step: (steps since the reset + 1) / warmup_steps, at most 1.

        The jagged cosine of ReLoRA (its figure 2). In the authors' code the first step after a reset has a rate of zero;
        here, as in the warm-up at the start of a run, it has the first rate above zero, so that no step is spent on nothing.
        """
        if self.num_resets == 0:
            return 1.0
        return min(1.0, (self._steps_done - self._last_reset_step + 1) / max(1, self._warmup_steps))

    def advance(self) -> bool:
        """Counts a step; returns whether a reset follows, and counts that too."""
        self._steps_done += 1
        if self._steps_done % self._interval or self._steps_done >= self._num_steps:
            return False
        self.num_resets += 1
        self._last_reset_step = self._steps_done
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """0-dim int64 tensors."""
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
    """W += s B A, in fp32; then A as at its initialization and B zero. The layer's output does not change.

    (ReLoRA, arXiv 2307.05695, Algorithm 1.) A must be random where B is zero: with both at zero, neither would get a
    gradient ever again.

    Args:
        generator: draws A, uniform within `lora_bound`; in the same state on every rank.
        rounding: for a weight in bf16; the layer's output is then unchanged on average.
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
    """Zeroes the smallest absolute values of each of a factor's moments, and first moments whose second moment is zeroed.

    The authors' code prunes each moment by itself. But A's first gradient after a reset is zero, as B is: where only the second
    moment were gone, Adam would divide the old first moment by eps, and step ten thousand times too far or more.

    Args:
        exp_avg, exp_avg_sq: [rows, width]; `num_pruned` of the second moments are zeroed, of the first as many or more.
    """
    means, squares = full_tensor(exp_avg), full_tensor(exp_avg_sq)
    kept = largest(squares, prune_ratio)
    copy_from_full_(exp_avg_sq, torch.where(kept, squares, 0))
    copy_from_full_(exp_avg, torch.where(kept & largest(means.abs(), prune_ratio), means, 0))


@torch.no_grad()
def prune_by_lot_(
    exp_avg: Tensor, exp_avg_sq: Tensor, prune_ratio: float, generator: torch.Generator
) -> None:
    """Zeroes `num_pruned` values of each of a factor's moments at random places, the same in both, for the reason given above.

    Args:
        exp_avg, exp_avg_sq: [rows, width].
        generator: on the CPU; in the same state on every rank.
    """
    kept = to_device(
        largest(torch.rand(exp_avg.shape, generator=generator), prune_ratio), exp_avg.device
    )
    for moment in (exp_avg, exp_avg_sq):
        copy_from_full_(moment, torch.where(kept, full_tensor(moment), 0))


def largest(scores: Tensor, prune_ratio: float) -> Tensor:
    """True where one of all but the `num_pruned` smallest scores is; of equal ones, those that come first.

    Returns:
        bool, shaped like `scores`.
    """
    # A stable sort, since a threshold would let ties decide how many remain, and ranks must agree on which.
    order = scores.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    # Not an assignment to `kept[order]`, which copies a number from the host, and makes it wait.
    kept.index_fill_(0, order[: scores.numel() - num_pruned(scores.numel(), prune_ratio)], True)
    return kept.view(scores.shape)


def num_pruned(num_values: int, prune_ratio: float) -> int:
    """How many of `num_values` are zeroed: the nearest integer to `prune_ratio` of them."""
    return round(prune_ratio * num_values)
