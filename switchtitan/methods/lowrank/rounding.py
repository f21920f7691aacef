"""Adding products to frozen weights, with stochastic rounding for weights in bf16."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.random import splitmix32
from switchtitan.distributed.shards import row_range
from switchtitan.methods.lowrank.linear import LowRankLinear
from switchtitan.optim.rounding import random_bits, round_to_bf16, rounding_key


@dataclass(frozen=True)
class Rounding:
    """The stochastic rounding of one weight in one event."""

    key: Tensor
    """0-dim int32."""
    first_row: int
    """Index of the local shard's first row in the full weight."""
    add_: Callable[..., None]
    """`add_rounded_`, compiled or not."""


class StochasticRounding:
    """The random bits that round weights in bf16.

    A pure function of the seed, the weight's name, the event, and the element's place in the full
    weight: nothing is stored, and the result does not depend on the number of ranks.

    Args:
        layers: by qualified name; their weights have one dtype.
        seed: the job's seed.
        compile_step: fuse an update into one kernel.
    """

    def __init__(self, layers: Mapping[str, LowRankLinear], seed: int, compile_step: bool) -> None:
        self._first_rows = [row_range(layer.weight).start for layer in layers.values()]
        first = next(iter(layers.values()))
        self._keys: Tensor | None = None
        if first.weight.dtype != first.lora_a.dtype:
            keys = [rounding_key(seed, name) for name in layers]
            self._keys = torch.tensor(keys, dtype=torch.int32, device=first.lora_a.device)
        self._add_: Callable[..., None] = compile_if(compile_step)(add_rounded_)

    def of_event(self, number: int) -> list[Rounding | None]:
        """Returns the rounding for each weight; None for weights of the factors' dtype.

        Args:
            number: of the event, below 2^31; two events must not share a number.
        """
        if self._keys is None:
            return [None] * len(self._first_rows)
        # Filled on the device: a copy from the host would synchronize.
        event = torch.full((), number, dtype=torch.int32, device=self._keys.device)
        keys = splitmix32(self._keys, event)
        return [
            Rounding(key, first_row, self._add_)
            for key, first_row in zip(keys.unbind(), self._first_rows, strict=True)
        ]

    def replicated(self) -> dict[str, Tensor]:
        """Returns the weights' keys, which are the same on every rank; none without rounding."""
        return {} if self._keys is None else {"rounding_keys": self._keys}


def add_product_(
    weight: Tensor, left: Tensor, right: Tensor, scale: float, rounding: Rounding | None
) -> None:
    """Adds scale * left right to a weight.

    Args:
        weight: [out, in], changed in place. A shard [out/ranks, in] works the same.
        left: [out, k], on the same rows as `weight`.
        right: [k, in].
        rounding: for a weight in bf16.
    """
    if rounding is None:
        weight.addmm_(left, right, alpha=scale)
    elif weight.numel():
        rounding.add_(weight, left @ right, rounding.key, first_row=rounding.first_row, scale=scale)


def add_rounded_(
    weight: Tensor, update: Tensor, key: Tensor, *, first_row: int, scale: float
) -> None:
    """Adds scale * update to a weight, summed in fp32 and rounded by `random_bits`.

    Args:
        weight: [rows, in] bf16, changed in place.
        update: [rows, in] fp32.
    """
    total = torch.add(weight.to(torch.float32), update, alpha=scale)
    weight.copy_(round_to_bf16(total, random_bits(key, first_row, *weight.shape)))
