"""Adds products to frozen weights, with stochastic rounding for weights of 16 bits.

Stochastic rounding is unbiased. Rounding to nearest would lose every change below half a unit in
the last place.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.rows import ShardedRows
from switchtitan.methods.adapter.linear import AdapterLinear
from switchtitan.numerics.fixed_point import FIXED, add_fixed_, random_words
from switchtitan.numerics.random import generator_for, splitmix32
from switchtitan.numerics.split_float import round_to_bf16

_MAX_ELEMENTS = 1 << 24
"""The most elements of a weight that are rounded at a time, which bounds temporary memory."""


class FrozenWeights:
    """Adds products to the frozen weights of adapters, by qualified name; these have one dtype.

    Weights of 16 bits are rounded by random bits, a pure function of the seed, the weight's name,
    the event, and the element's place in the full weight: nothing is stored, and the bits do not
    depend on the number of ranks.
    """

    def __init__(self, layers: Mapping[str, AdapterLinear], seed: int, compile_step: bool) -> None:
        self._weights = [(ShardedRows(layer.weight), layer.scale) for layer in layers.values()]
        first = next(iter(layers.values()))
        add = add_fixed_ if first.weight.dtype == FIXED else add_rounded_
        self._add: Callable[..., None] = compile_if(compile_step)(add)
        self._keys: Tensor | None = None
        if first.weight.itemsize == 2:
            # The upper 31 bits of a generator's seed.
            keys = [generator_for(seed, f"{name}.rounding").initial_seed() >> 32 for name in layers]
            self._keys = torch.tensor(keys, dtype=torch.int32, device=first.lora_a.device)

    @torch.no_grad()
    def add_products_(self, event: int, products: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Adds s B A to the weights of some layers.

        Args:
            event: a number below 2^31, such as a step's, of this addition alone.
            products: index of the layer, A [k, in] and B transposed, [k, out], both unsharded.
        """
        keys: tuple[Tensor, ...] = ()
        if self._keys is not None:
            # Filled on the device: a copy from the host would synchronize.
            number = torch.full((), event, dtype=torch.int32, device=self._keys.device)
            keys = splitmix32(self._keys, number).unbind()
        for index, lora_a, lora_b in products:
            weight, scale = self._weights[index]
            held = weight.held
            own_b = lora_b[:, held.start : held.stop].t()
            if not keys:
                weight.shard.addmm_(own_b, lora_a, alpha=scale)
                continue
            num_rows = max(1, _MAX_ELEMENTS // lora_a.shape[1])
            for first in range(0, len(held), num_rows):
                shard, update = weight.shard[first:][:num_rows], own_b[first:][:num_rows] @ lora_a
                # torch.compile would recompile for every new Python number.
                first_row = torch.full_like(keys[index], held.start + first)
                self._add(shard, update, keys[index], first_row=first_row, scale=scale)

    def replicated(self) -> dict[str, Tensor]:
        """Returns the weights' keys, which are the same on every rank; none without rounding."""
        return {} if self._keys is None else {"rounding_keys": self._keys}


def add_rounded_(
    weight: Tensor, update: Tensor, key: Tensor, *, first_row: Tensor | int, scale: float
) -> None:
    """Adds scale * update, fp32, to a weight in bf16, [rows, in], rounded stochastically."""
    total = torch.add(weight.to(torch.float32), update, alpha=scale)
    weight.copy_(round_to_bf16(total, random_words(key, first_row, *weight.shape)))
