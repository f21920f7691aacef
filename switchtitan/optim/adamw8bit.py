"""AdamW with moments in 8 bits, and its update of parameters in any number of bits."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from switchtitan.contracts import TrainingOptimizer
from switchtitan.distributed.blocks import compile_if
from switchtitan.distributed.copies import to_device
from switchtitan.distributed.shards import local
from switchtitan.optim.adamw import AdamKeys, AdamW
from switchtitan.optim.base import GroupedOptimizer, SplitOptimizer
from switchtitan.optim.moments import Moments, Stored, block_size, decoded, encode_
from switchtitan.optim.parameters import TrainedParameter
from switchtitan.optim.weights import Weight, Weights, as_rows, joined, rows_of, write_

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name of a moment in checkpoints -> whether it has a sign."""
_MAX_ELEMENTS = 1 << 24
"""The most elements of a parameter that are updated at a time, which bounds temporary memory."""


class AdamW8bitConfig(AdamKeys):
    """`[optimizer] name = "adamw8bit"`: AdamW with moments in 8 bits (arXiv 2110.02861). A moment
    takes one byte for each element, and four for each block of at most 256 elements of a row.
    Vectors, and rows without a divisor from 64 to 256, keep moments in fp32. Compile it, since a
    matrix takes some forty kernels otherwise."""

    width_exponent: ClassVar[float] = 1.0
    trains_bf16: ClassVar[bool] = True
    has_8bit_moments: ClassVar[bool] = True
    name: Literal["adamw8bit"] = "adamw8bit"
    """The optimizer."""


class AdamW8bit(GroupedOptimizer):
    """AdamW with moments in 8 bits for matrices that have a `block_size`, on local shards.

    The state is `<parameter>.step`, and that of `Moments` and `Weights`. `compile_step` compiles
    the update of each shape.
    """

    def __init__(
        self, config: AdamKeys, parameters: Iterable[TrainedParameter], compile_step: bool
    ) -> None:
        super().__init__(config, parameters)
        self._adam, self._update = config, compile_if(compile_step)(update_)
        self._moments = [Moments(*moment, self.parameters, True) for moment in MOMENTS.items()]
        self._weights = Weights(self.parameters, splits=True)
        self.state = {f"{name}.step": torch.zeros((), device="cpu") for name in self.parameters}
        self.state |= self._weights.state
        for moments in self._moments:
            self.state |= moments.state

    @torch.no_grad()
    def step(self) -> None:
        rates = {
            name: (rate, 1 - rate * group.weight_decay)
            for group, rate in zip(self.groups, self.rates, strict=True)
            for name, parameter in group.parameters.items()
            if parameter.grad is not None
        }
        if not rates:
            return
        lr, decay = torch.tensor(list(rates.values()), dtype=torch.float32, device="cpu").unbind(1)
        num_steps = torch.stack([self.state[f"{name}.step"].add_(1) for name in rates])
        size_and_eps = step_size_and_eps(num_steps, lr, self._adam)
        table = torch.stack([torch.ones_like(lr), decay, *size_and_eps], 1)[:, :, None, None]
        table = to_device(table, self.parameters[next(iter(rates))].device)
        weights = self._weights.next()
        for name, coefficients in zip(rates, table.split(1), strict=True):
            for part in self._parts(name, weights[name]):
                self._update(*part, coefficients=coefficients, betas=self._adam.betas)

    def _parts(self, name: str, weight: Weight) -> Iterator[tuple[Any, ...]]:
        """Yields lists of one: rows of the parameter, of its moments and of its gradient."""
        gradient = self.parameters[name].grad
        assert gradient is not None
        grad = as_rows(local(gradient))
        num_rows = max(1, _MAX_ELEMENTS // grad.shape[1])
        for first in range(0, len(grad), num_rows):
            rows = slice(first, first + num_rows)
            moments = ([_rows_of(each.stored[name], rows)] for each in self._moments)
            yield ([rows_of(weight, first, num_rows)], *moments, [grad[rows]])


def _rows_of(stored: Stored, rows: slice) -> Stored:
    if len(stored) == 1:
        return (as_rows(stored[0])[rows],)
    codes, scale, values, limits = stored
    return codes[rows], scale[rows], values, limits


def build_adamw8bit(
    config: AdamKeys, parameters: Iterable[TrainedParameter], compile_step: bool
) -> TrainingOptimizer:
    """Returns AdamW, with moments in 8 bits for parameters that have a `block_size`."""
    whole, others = list[TrainedParameter](), list[TrainedParameter]()
    for trained in parameters:
        has_blocks = block_size(tuple(trained.parameter.shape)) is not None
        is_whole = trained.parameter.dtype != torch.bfloat16 and not has_blocks
        (whole if is_whole else others).append(trained)
    adamw = AdamW(config, whole)
    return SplitOptimizer([adamw, AdamW8bit(config, others, compile_step)]) if others else adamw


def step_size_and_eps(
    num_steps: Tensor, lr: Tensor | float, adam: AdamKeys
) -> tuple[Tensor, Tensor]:
    """Returns lr sqrt(1 - beta2^n) / (1 - beta1^n), with both bias corrections, and
    eps sqrt(1 - beta2^n), after n steps."""
    root = (1 - adam.betas[1] ** num_steps).sqrt()
    return lr * root / (1 - adam.betas[0] ** num_steps), root * adam.eps


def update_(
    weights: list[Weight],
    stored_means: list[Stored],
    stored_squares: list[Stored],
    grads: list[Tensor],
    *,
    coefficients: Tensor,
    betas: tuple[float, float],
) -> None:
    """Updates weights [rows, width] and their moments by AdamW (arXiv 1711.05101, Algorithm 2).

    Args:
        coefficients: mask, decay, step size and eps, with bias corrections, of each row,
            [parameters, 4, rows or 1, 1]. A row whose mask is 0 has a gradient of zero.
    """
    mask, decay, step_size, eps = zip(*map(Tensor.unbind, coefficients.unbind()), strict=True)
    means, squares = [*map(decoded, stored_means)], [*map(decoded, stored_squares)]
    parameters = [*map(joined, weights)]
    masked = torch._foreach_mul(grads, mask)
    torch._foreach_lerp_(means, masked, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    # Compiled for a CPU, lists would be rounded twice here.
    for square, grad in zip(squares, masked, strict=True):
        square.addcmul_(grad, grad, value=1 - betas[1])
    roots = torch._foreach_sqrt(squares)
    torch._foreach_add_(roots, eps)
    torch._foreach_mul_(parameters, decay)
    torch._foreach_addcdiv_(parameters, torch._foreach_mul(means, step_size), roots, -1)
    for stored, values in zip(stored_means + stored_squares, means + squares, strict=True):
        encode_(stored, values)
    for weight, values in zip(weights, parameters, strict=True):
        write_(weight, values)
