"""Moments of an optimizer, in fp32 or in 8 bits."""

from collections.abc import Mapping

import torch
from torch import Tensor

from switchtitan.distributed.shards import as_shard_of, local

_MAX_BLOCK_SIZE, _MIN_BLOCK_SIZE = 256, 64

Stored = tuple[Tensor, ...]
"""This rank's rows of a moment in fp32 alone; or in 8 bits: codes [rows, width], scales [rows,
blocks], the 256 values in [-1, 1] that codes stand for, in order, and the 255 limits of codes."""


class Moments:
    """One moment of each of several parameters, zero at first, sharded like them.

    In 8 bits it takes a byte for each element, and four for each block of a row, as in Dettmers et
    al. 2021 (arXiv 2110.02861). Blocks depend on the full shape alone, so training does not depend
    on how rows are sharded; parameters without a `block_size` have moments in fp32.

    Args:
        key: `<parameter>.<key>` is the name in checkpoints; in 8 bits, with `.codes` and `.scale`.
        is_signed: whether values may be below zero.

    Attributes:
        stored: by parameter.
        state: live tensors by the name that checkpoints have.
    """

    def __init__(
        self, key: str, is_signed: bool, parameters: Mapping[str, Tensor], in_8_bits: bool
    ) -> None:
        self.stored: dict[str, Stored] = {}
        self.state: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            size = block_size(tuple(parameter.shape)) if in_8_bits else None
            if size is None:
                # In fp32 also for a parameter in bf16 that `Weights` splits.
                dtype = torch.promote_types(parameter.dtype, torch.float32) if in_8_bits else None
                mean = torch.zeros_like(parameter, dtype=dtype).detach()
                self.state[f"{name}.{key}"] = mean
                self.stored[name] = (local(mean),)
                continue
            shard = local(parameter.detach())
            codes = torch.zeros_like(shard, dtype=torch.uint8)
            scale = shard.new_zeros(len(shard), shard.shape[1] // size, dtype=torch.float32)
            # Tables of its own: Inductor fuses kernels that read the same, which then spill.
            values = torch.tensor(values_of_codes(is_signed), dtype=torch.float32)
            limits = (values[1:] + values[:-1]) / 2
            if not is_signed:
                # No code of 0, so that a small second moment never makes an update large.
                limits[0] = -1
            self.stored[name] = (codes, scale, values.to(shard.device), limits.to(shard.device))
            for part, tensor in {"codes": codes, "scale": scale}.items():
                self.state[f"{name}.{key}.{part}"] = as_shard_of(tensor, parameter)

    def rows(self) -> list[list[Tensor | None]]:
        """Returns lists of all tensors that have rows like the parameters, one for each part."""
        stored = list(self.stored.values())
        scales = [parts[1] if len(parts) > 1 else None for parts in stored]
        return [[parts[0] for parts in stored], scales]

    def zeros(self) -> list[Tensor]:
        """Returns a tensor for each parameter whose rows, set to zero, are moments of zero."""
        return [parts[min(1, len(parts) - 1)] for parts in self.stored.values()]


def decoded(stored: Stored) -> Tensor:
    """Returns a moment [rows, width] in fp32; if it is stored so, the moment itself."""
    if len(stored) == 1:
        return stored[0]
    codes, scale, values, _ = stored
    blocks = values[codes.to(torch.int32)].unflatten(1, (scale.shape[1], -1))
    return (blocks * scale.unsqueeze(2)).flatten(1)


def encode_(stored: Stored, values: Tensor) -> None:
    """Writes what `decoded` returned, with other values, to where it is stored."""
    if len(stored) == 1:
        return
    codes, scale, _, limits = stored
    blocks = values.unflatten(1, (scale.shape[1], -1))
    scale.copy_(blocks.abs().amax(2))
    parts = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(2)
    codes.copy_(torch.bucketize(parts.flatten(1), limits, out_int32=True))


def values_of_codes(is_signed: bool) -> list[float]:
    """Returns the 256 values of 8-bit codes, in order (dynamic tree quantization, arXiv 2110.02861,
    sec. 2.2): 0, 1, and for each e from 0 to 6 the middles of 2^e equal parts of 10^(e - 6) times
    [0.1, 1], with both signs; of 2^(e + 1) parts without a sign."""
    values = [0.0, 1.0]
    for exponent in range(7):
        num = 2**exponent * (1 if is_signed else 2)
        for index in range(num):
            value = (0.1 + 0.9 * (index + 0.5) / num) * 10.0 ** (exponent - 6)
            values += [value, -value] if is_signed else [value]
    return sorted(values)


def block_size(shape: tuple[int, ...]) -> int | None:
    """Returns how many elements of a row share a scale, by the full parameter's shape; None for
    moments in fp32."""
    sizes = range(_MAX_BLOCK_SIZE, _MIN_BLOCK_SIZE - 1, -1) if len(shape) == 2 else ()
    return next((size for size in sizes if shape[1] % size == 0), None)
