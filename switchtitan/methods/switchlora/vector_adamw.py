"""AdamW with one step count for each vector of the factors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.distributed.shards import ShardedRows, local, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.schedule import FACTORS, VectorSpan
from switchtitan.methods.switchlora.switch import fill_vectors_
from switchtitan.optim import AdamWConfig

Update = Callable[..., None]

_CHUNK_SIZE = 8
"""The most factors that one call updates. A call of a compiled function takes about 40 us, as long
as the update of a small factor; compile time grows with the factors in a call."""


class _Chunk(NamedTuple):
    """Factors of one shape, updated in one call: indices, and local shards of their moments."""

    factors: list[int]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]


class VectorAdamW:
    """AdamW on A and B of all layers, with bias corrections from each vector's own step count.

    (SwitchLoRA, arXiv 2406.06564, sec. 3.) Equals torch's AdamW as long as no vector is reset or
    frozen. Factors are indexed as the flattened first two dimensions of tables [2, layers, rank]: A
    of all layers, then B of all layers.

    Args:
        layers: by qualified name, all of one rank.
        compile_step: fuse the update of a factor into one kernel, several factors in a call.

    Attributes:
        num_steps: [2, layers, rank] fp32, the updates of each vector, including those while it was
            frozen; the same on every rank.
    """

    def __init__(
        self, config: AdamWConfig, layers: dict[str, LowRankLinear], compile_step: bool
    ) -> None:
        self._config = config
        keys = ("lora_a", "lora_b")
        self._names = [f"{name}.{key}" for key in keys for name in layers]
        factors = [layer.get_parameter(key) for key in keys for layer in layers.values()]
        self._factors = factors
        self._exp_avg = [ShardedRows(torch.zeros_like(p, requires_grad=False)) for p in factors]
        self._exp_avg_sq = [ShardedRows(torch.zeros_like(p, requires_grad=False)) for p in factors]
        self._held = row_range(factors[0])
        self.num_steps = torch.zeros(
            len(FACTORS), len(layers), factors[0].shape[0], device=factors[0].device
        )
        # A tensor: torch.compile would recompile for every new Python number.
        self._lr = torch.tensor(config.lr, dtype=factors[0].dtype, device=factors[0].device)
        self._chunks = self._same_shaped_chunks()
        in_order = [factor for chunk in self._chunks for factor in chunk.factors]
        self._order = torch.tensor(in_order, device=factors[0].device, dtype=torch.int64)
        self._update: Update = (
            torch.compile(update_vectors_, fullgraph=True, dynamic=False)
            if compile_step
            else update_vectors_
        )

    def set_lr(self, lr_factor: float) -> None:
        self._lr.fill_(self._config.lr * lr_factor)

    @torch.no_grad()
    def reset(self, spans: list[VectorSpan]) -> None:
        """Zeroes these vectors' moments and step counts."""
        fill_vectors_(self.num_steps, spans, 0)
        _zero_all_(self._views(self._exp_avg, spans) + self._views(self._exp_avg_sq, spans))

    @torch.no_grad()
    def reset_first_moments(self, spans: list[VectorSpan]) -> None:
        """Zeroes only these vectors' first moments."""
        _zero_all_(self._views(self._exp_avg, spans))

    @torch.no_grad()
    def step(self, update_mask: Tensor) -> None:
        """Updates every vector.

        Args:
            update_mask: [2, layers, rank] bool; a vector for which it is false gets a gradient of
                zero and does not change, not even by weight decay. Its step count still increases.
        """
        beta1, beta2 = self._config.betas
        self.num_steps += 1
        coefficients = self._coefficients(update_mask).flatten(1, 2)[:, self._order]
        coefficients = coefficients[:, :, self._held.start : self._held.stop].unsqueeze(-1)
        position = 0
        for chunk in self._chunks:
            stop = position + len(chunk.factors)
            self._update(
                [local(self._factors[factor]) for factor in chunk.factors],
                [local(self._gradient(factor)) for factor in chunk.factors],
                chunk.exp_avg,
                chunk.exp_avg_sq,
                coefficients[:, position:stop],
                beta1=beta1,
                beta2=beta2,
            )
            position = stop

    def _coefficients(self, update_mask: Tensor) -> Tensor:
        """Returns the coefficients of each vector's update, [4, 2, layers, rank].

        With n the vector's steps: 1 if it is updated, else 0; lr sqrt(1 - beta2^n) / (1 - beta1^n),
        0 if frozen; eps sqrt(1 - beta2^n); 1 - lr * weight_decay, 1 if frozen. Both bias
        corrections are in the step size, which saves a division per element.
        """
        beta1, beta2 = self._config.betas
        num_steps = self.num_steps.to(self._lr.dtype)
        root_corrections = (1 - beta2**num_steps).sqrt()
        step_sizes = self._lr * root_corrections / (1 - beta1**num_steps)
        decay_factors = 1 - self._lr * self._config.weight_decay * update_mask
        return torch.stack(
            [
                update_mask.to(self._lr.dtype),
                step_sizes * update_mask,
                self._config.eps * root_corrections,
                decay_factors,
            ]
        )

    def _same_shaped_chunks(self) -> list[_Chunk]:
        """Returns chunks of all factors with local rows.

        Chunks of one shape have one size, so that they share a graph.
        """
        factors_of: dict[torch.Size, list[int]] = {}
        for factor, parameter in enumerate(self._factors):
            if local(parameter).numel() > 0:
                factors_of.setdefault(local(parameter).shape, []).append(factor)
        chunks = []
        for factors in factors_of.values():
            size = _largest_divisor(len(factors), _CHUNK_SIZE)
            for start in range(0, len(factors), size):
                of_chunk = factors[start : start + size]
                exp_avg = [local(self._exp_avg[factor].matrix) for factor in of_chunk]
                exp_avg_sq = [local(self._exp_avg_sq[factor].matrix) for factor in of_chunk]
                chunks.append(_Chunk(of_chunk, exp_avg, exp_avg_sq))
        return chunks

    def _gradient(self, factor: int) -> Tensor:
        grad = self._factors[factor].grad
        assert grad is not None, f"no gradient for {self._names[factor]}"
        return grad

    def _views(self, moments: list[ShardedRows], spans: list[VectorSpan]) -> list[Tensor]:
        """Returns this rank's rows of these vectors."""
        num_layers = self.num_steps.shape[1]
        return [
            view
            for factor, layer, vectors in spans
            for view in moments[factor * num_layers + layer].views((vectors,))
        ]

    def zero_grad(self) -> None:
        for parameter in self._factors:
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns `<layer>.lora_a.exp_avg` and so on, sharded like the factors."""
        return {
            f"{name}.{key}": rows.matrix
            for key, moments in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, rows in zip(self._names, moments, strict=True)
        }


def update_vectors_(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    coefficients: Tensor,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """Updates factors of one shape by AdamW (arXiv 1711.05101, Algorithm 2), vector by vector.

    Args:
        parameters, exp_avgs, exp_avg_sqs: [rank, width], or shards; changed in place.
        coefficients: [4, factors, rank, 1]; see `VectorAdamW._coefficients`.
    """
    for index, (parameter, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        mask, step_sizes, eps, decay_factors = coefficients[:, index].unbind()
        grad = grad * mask
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(decay_factors).addcdiv_(
            exp_avg * step_sizes, exp_avg_sq.sqrt().add_(eps), value=-1
        )


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _zero_all_(tensors: list[Tensor]) -> None:
    if tensors:
        torch._foreach_zero_(tensors)
