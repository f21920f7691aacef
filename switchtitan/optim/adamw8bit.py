"""AdamW with moments in 8 bits, by torchao."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.shards import as_shard_of, local
from switchtitan.errors import EnvironmentMismatchError
from switchtitan.optim.adamw import AdamKeys
from switchtitan.optim.base import GroupedOptimizer
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.torch_optimizer import TorchOptimizer

_MAX_BLOCK_SIZE, _MIN_BLOCK_SIZE, _MIN_ELEMENTS = 256, 64, 4096
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name of a moment in torchao's state -> whether it has a sign."""


class AdamW8bitConfig(AdamKeys):
    """`[optimizer] name = "adamw8bit"`: `torchao.optim.AdamW8bit`, AdamW with moments in 8 bits
    (arXiv 2110.02861); `pip install 'switchtitan[torchao]'`. A moment takes one byte for each
    element, and four for each block of at most 256 elements of a row. Vectors, matrices with fewer
    than 4096 elements and rows without a divisor from 64 to 256 keep moments in fp32. Updates one
    parameter after the other; compile it, since a matrix takes over 100 kernels otherwise."""

    name: Literal["adamw8bit"] = "adamw8bit"
    """The optimizer."""
    package: ClassVar[str | None] = "torchao"


class AdamW8bit(TorchOptimizer):
    """`torchao.optim.AdamW8bit` on local shards.

    Torchao would quantize blocks of a flattened shard, so that blocks and the choice of parameters
    depended on the number of ranks. Here blocks are parts of rows, and the choice depends on the
    full shape: training and checkpoints do not depend on how rows are sharded. State is saved as
    plain tensors, since torch.distributed.checkpoint would pickle torchao's tensors.

    Args:
        compile_step: compile the update of each shape.
    """

    def __init__(
        self,
        config: AdamW8bitConfig,
        parameters: Iterable[TrainedParameter],
        compile_step: bool = False,
    ) -> None:
        build = partial(_torchao_optimizer(), betas=config.betas, eps=config.eps)
        # Torchao compiles by itself.
        super().__init__(config, parameters, build, compile_step=False)
        _compute_tables()
        self._stance = "default" if compile_step else "force_eager"
        for name, held in self._held.items():
            num_steps = self.state[f"{name}.step"] = torch.tensor(0.0)
            own = self._optimizer.state[held] = {"step": num_steps}
            for moment, is_signed in _MOMENTS.items():
                own[moment] = self._add_moment(name, moment, is_signed)
        self._has_started = True

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<parameter>.step`, and `.exp_avg` and `.exp_avg_sq` in fp32 or, in 8 bits, their
        `.codes` [out, in] and `.scale` [out, blocks]."""
        return GroupedOptimizer.state_dict(self)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        GroupedOptimizer.load_state_dict(self, state)

    def _add_moment(self, name: str, moment: str, is_signed: bool) -> Tensor:
        """Returns a moment at zero for torchao, and adds its tensors to those that are saved."""
        from torchao.optim.subclass_8bit import OptimState8bit

        parameter = self.parameters[name]
        shard, key = local(parameter.detach()), f"{name}.{moment}"
        size = block_size(tuple(parameter.shape))
        if size is None:
            zeros = torch.zeros_like(shard)
            self.state[key] = as_shard_of(zeros, parameter)
            return zeros
        # One row if the shard is empty, for which torchao has no block size.
        rows = max(1, shard.shape[0])
        in_8_bits: Tensor = OptimState8bit.zeros(
            (rows, shard.shape[1]), is_signed, size, shard.device, shard.dtype
        )
        parts = {"codes": in_8_bits.codes, "scale": in_8_bits.scale.view(rows, -1)}  # type: ignore[attr-defined]
        for part, tensor in parts.items():
            self.state[f"{key}.{part}"] = as_shard_of(tensor[: shard.shape[0]], parameter)
        return in_8_bits

    def _tensors_to_hold(self) -> dict[str, nn.Parameter]:
        return {
            name: nn.Parameter(local(parameter.detach()))
            for name, parameter in self.parameters.items()
        }

    @torch.no_grad()
    def _update(self, step: Callable[[], object]) -> None:
        for name, held in self._held.items():
            parameter = self.parameters[name]
            if parameter.grad is None:
                continue
            # FSDP may replace a shard before the first forward pass.
            held.data = local(parameter.detach())
            if held.numel():
                held.grad = local(parameter.grad)
            else:
                self._optimizer.state[held]["step"] += 1
        with torch.compiler.set_stance(self._stance):
            step()
        for held in self._held.values():
            held.grad = None


def build_adamw8bit(
    config: AdamW8bitConfig, parameters: Iterable[TrainedParameter], compile_step: bool, seed: int
) -> TrainingOptimizer:
    return AdamW8bit(config, parameters, compile_step)


def block_size(shape: tuple[int, ...]) -> int | None:
    """Returns the elements of a row that share a scale; None for moments in fp32.

    Args:
        shape: of the full parameter.
    """
    if len(shape) != 2 or shape[0] * shape[1] < _MIN_ELEMENTS:
        return None
    return next(
        (size for size in range(_MAX_BLOCK_SIZE, _MIN_BLOCK_SIZE - 1, -1) if shape[1] % size == 0),
        None,
    )


def _compute_tables() -> None:
    """Lets torchao compute its tables of values, which it keeps, from real tensors."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    with unset_fake_temporarily():
        get_qmap_signed()
        get_qmap_unsigned()


def _torchao_optimizer() -> Callable[..., torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit
    except ImportError as error:
        raise EnvironmentMismatchError(
            f'[optimizer] name = "adamw8bit": cannot import torchao ({error}); install a version '
            f"for torch {torch.__version__}, or choose another optimizer"
        ) from error
    build: Callable[..., torch.optim.Optimizer] = TorchaoAdamW8bit
    return build
