"""Random initial values, drawn in blocks of rows, so that a rank draws only the rows it holds.

A block is a function of the seed, the tensor's name and the block's index, and its size follows
from the tensor's shape. So values do not depend on the number of ranks.
"""

import math
from collections.abc import Callable, Set

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode

from switchtitan.contracts import LanguageModel, Reparametrized
from switchtitan.errors import abbreviate
from switchtitan.numerics.random import generator_for

_LARGEST_BLOCK = 1 << 19
"""Tensors with at most this many elements are one block."""
_NUM_BLOCKS = 16
"""Blocks of a larger tensor, at most. Products of smaller blocks are slower."""

GeneratorFor = Callable[[str], torch.Generator]
"""Name -> generator, the same on every rank."""
ReadRows = Callable[[str, range], Tensor]
"""(name of a plain model's parameter, rows) -> its values, on the CPU."""


def block_size(shape: tuple[int, ...]) -> int:
    """Returns the number of rows in each block of a tensor; the last one may have fewer."""
    if math.prod(shape) <= _LARGEST_BLOCK:
        return max(1, shape[0])
    return -(-shape[0] // _NUM_BLOCKS)


def covering_blocks(shape: tuple[int, ...], rows: range) -> range:
    """Returns all rows of the blocks that contain `rows`."""
    if not rows:
        return range(0)
    size = block_size(shape)
    return range(rows.start // size * size, min(-(-rows.stop // size) * size, shape[0]))


def split_blocks(shape: tuple[int, ...], rows: range) -> list[range]:
    """Splits rows that `covering_blocks` returned into blocks."""
    # Fake tensors have no values, and an operation on one takes as long as on 20 000 real elements.
    if active_fake_mode() is not None:
        return [rows] if rows else []
    size = block_size(shape)
    return [range(start, min(start + size, rows.stop)) for start in rows[::size]]


def check_replaced(model: nn.Module, plain_names: Set[str]) -> None:
    """Raises a TypeError if a layer that is no `Reparametrized` has other parameters or buffers
    than those of the plain model, by qualified name: it would have no initial values for them."""
    for module_name, module in model.named_modules():
        if not isinstance(module, Reparametrized):
            own = dict(module.named_parameters(module_name, recurse=False))
            own |= dict(module.named_buffers(module_name, recurse=False))
            if unknown := own.keys() - plain_names:
                raise TypeError(
                    f"{type(module).__name__} has tensors that the plain model lacks "
                    f"({abbreviate(sorted(unknown))}), and no initial values for them; derive it "
                    "from contracts.Reparametrized"
                )


def plain_value(
    model: LanguageModel, seed: int, name: str, shape: torch.Size, rows: range | None = None
) -> Tensor:
    """Returns rows, by default all, of the initial value of the plain model's parameter `name`.

    fp32 on the CPU. The first block's generator is that of `name`; the others are those of
    `<name>#<index>`. `shape` [rows, ...] is the parameter's.
    """
    wanted = range(shape[0]) if rows is None else rows
    covering = covering_blocks(shape, wanted)
    if not covering:
        return torch.empty(0, *shape[1:])
    blocks = []
    for block in split_blocks(shape, covering):
        index = block.start // block_size(shape)
        generator = generator_for(seed, name if index == 0 else f"{name}#{index}")
        block_shape = torch.Size((len(block), *shape[1:]))
        blocks.append(model.initial_value(name, block_shape, generator))
    values = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return values[wanted.start - covering.start : wanted.stop - covering.start]
