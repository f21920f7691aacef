"""Parameters as an optimizer updates them: in fp32, or in bf16 with 8 more bits here."""

from collections.abc import Mapping

import torch
from torch import Tensor

from switchtitan.distributed.copies import to_device
from switchtitan.distributed.shards import local, row_range
from switchtitan.numerics.fixed_point import random_words
from switchtitan.numerics.random import generator_for, splitmix32
from switchtitan.numerics.split_float import join, split

Weight = tuple[Tensor, ...]
"""This rank's rows [rows, width] of a parameter alone; or of one in bf16, with 8 more bits (int8),
and the key and first row (0-dim int32) of the random bits that round its next update."""


class Weights:
    """The local shards of vectors and matrices. With `splits`, those in bf16 have 8 more bits here,
    which updates alone see.

    An update is rounded to 24 bits stochastically, by bits that depend on its number and on the
    parameter's name and row alone, so training does not depend on how rows are sharded.

    Attributes:
        low_bits: of parameters in bf16, by name, sharded like them.
        state: live tensors by the name that checkpoints have.
    """

    def __init__(self, parameters: Mapping[str, Tensor], splits: bool) -> None:
        self._parts: dict[str, Weight] = {
            name: (as_rows(local(p.detach())),) for name, p in parameters.items()
        }
        dtype = torch.bfloat16 if splits else None
        split_ones = {name: p for name, p in parameters.items() if p.dtype == dtype}
        self.low_bits = {
            name: torch.zeros_like(parameter, dtype=torch.int8).detach()
            for name, parameter in split_ones.items()
        }
        self._parts |= {n: (*self._parts[n], as_rows(local(b))) for n, b in self.low_bits.items()}
        self.state = {f"{name}.low_bits": bits for name, bits in self.low_bits.items()}
        if split_ones:
            names = list(split_ones)
            self._num_updates = torch.zeros((), dtype=torch.int32, device="cpu")
            self.state[f"{names[0]}.num_updates"] = self._num_updates
            # The upper 31 bits of a generator's seed.
            seeds = [generator_for(0, f"{name}.rounding").initial_seed() >> 32 for name in names]
            self._keys = torch.tensor(seeds, dtype=torch.int32, device="cpu")
            self._device = split_ones[names[0]].device
            firsts = [row_range(parameter).start for parameter in split_ones.values()]
            table = torch.tensor(firsts, dtype=torch.int32, device="cpu")
            self._first_rows = to_device(table, self._device).unbind()

    def next(self) -> dict[str, Weight]:
        """Returns the parameters by name, with new random bits for an update; all ranks call."""
        if not self.low_bits:
            return self._parts
        self._num_updates.add_(1)
        keys = to_device(splitmix32(self._keys, self._num_updates), self._device).unbind()
        of_split = zip(self.low_bits, keys, self._first_rows, strict=True)
        return self._parts | {
            name: (*self._parts[name], key, first_row) for name, key, first_row in of_split
        }


def as_rows(shard: Tensor) -> Tensor:
    """Returns a view [rows, width] of a vector or a matrix."""
    return shard.unsqueeze(1) if shard.ndim == 1 else shard.flatten(1)


def rows_of(weight: Weight, first: int, num_rows: int) -> Weight:
    """Returns some of the rows of a weight."""
    rows = slice(first, first + num_rows)
    if len(weight) == 1:
        return (weight[0][rows],)
    high, low, key, first_row = weight
    return high[rows], low[rows], key, first_row + first if first else first_row


def joined(weight: Weight) -> Tensor:
    """Returns a weight [rows, width] in fp32; if it is stored so, the weight itself."""
    return weight[0] if len(weight) == 1 else join(*weight[:2])


def write_(weight: Weight, values: Tensor) -> None:
    """Writes what `joined` returned, with other values, to where it is stored."""
    if len(weight) > 1:
        words = random_words(weight[2], weight[3], *values.shape)
        for part, rounded in zip(weight[:2], split(values, words), strict=True):
            part.copy_(rounded)
