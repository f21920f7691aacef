"""AdamW with moments in 8 bits, by torchao."""

from collections.abc import Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from switchtitan.distributed.shards import as_shard_of, local
from switchtitan.optim.adamw import AdamKeys
from switchtitan.optim.moments import block_size, table_of_values
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.torch_optimizer import TorchOptimizer

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name of a moment in torchao's state -> whether it has a sign."""


class AdamW8bitConfig(AdamKeys):
    """`[optimizer] name = "adamw8bit"`: `torchao.optim.AdamW8bit`, AdamW with moments in 8 bits
    (arXiv 2110.02861); `pip install '.[torchao]'`. A moment takes one byte for each
    element, and four for each block of at most 256 elements of a row. Vectors, matrices with fewer
    than 4096 elements and rows without a divisor from 64 to 256 keep moments in fp32. Updates one
    parameter after the other; compile it, since a matrix takes over 100 kernels otherwise."""

    width_exponent: ClassVar[float] = 1.0
    name: Literal["adamw8bit"] = "adamw8bit"
    """The optimizer."""
    package: ClassVar[str | None] = "torchao"


class AdamW8bit(TorchOptimizer):
    """`torchao.optim.AdamW8bit` on local shards.

    Torchao would quantize blocks of a flattened shard, so that blocks and the choice of parameters
    depended on the number of ranks. Here blocks are parts of rows, and the choice depends on the
    full shape: training and checkpoints do not depend on how rows are sharded. State is saved as
    plain tensors, since torch.distributed.checkpoint would pickle torchao's tensors.
    `compile_step` compiles the update of each shape.
    """

    def __init__(
        self, config: AdamKeys, parameters: Iterable[TrainedParameter], compile_step: bool
    ) -> None:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit

        for is_signed in MOMENTS.values():
            table_of_values(is_signed)  # torchao keeps them, and they must not be fake tensors
        build = partial(TorchaoAdamW8bit, betas=config.betas, eps=config.eps)
        # Torchao compiles by itself.
        super().__init__(config, parameters, build, _state_in_fp32)
        self._stance = "default" if compile_step else "force_eager"

    def step(self) -> None:
        with torch.compiler.set_stance(self._stance):
            super().step()

    def _create_state(self, name: str) -> dict[str, Tensor]:
        """Adds `<parameter>.step`, and `.exp_avg` and `.exp_avg_sq` in fp32 or, in 8 bits, their
        `.codes` [out, in] and `.scale` [out, blocks]."""
        from torchao.optim.subclass_8bit import OptimState8bit

        parameter = self.parameters[name]
        size = block_size(tuple(parameter.shape))
        if size is None:
            return super()._create_state(name)
        shard = local(parameter.detach())
        rows, columns = self._padded(shard).shape
        state = {"step": torch.tensor(0.0)}
        self.state[f"{name}.step"] = state["step"]
        for moment, is_signed in MOMENTS.items():
            in_8_bits: Tensor = OptimState8bit.zeros(
                (rows, columns), is_signed, size, shard.device, shard.dtype
            )
            state[moment] = in_8_bits
            parts = {"codes": in_8_bits.codes, "scale": in_8_bits.scale.view(rows, -1)}  # type: ignore[attr-defined]
            for part, tensor in parts.items():
                saved = as_shard_of(tensor[: len(shard)], parameter)
                self.state[f"{name}.{moment}.{part}"] = saved
        return state

    def _padded(self, shard: Tensor) -> Tensor:
        # Torchao has no block size for an empty tensor.
        return shard if shard.numel() else shard.new_zeros(1, *shard.shape[1:])


def _state_in_fp32(like: Tensor) -> dict[str, Tensor]:
    return {"step": torch.tensor(0.0), **{moment: torch.zeros_like(like) for moment in MOMENTS}}
