"""AdamW with a step count of its own for every vector of the factors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from switchtitan.distributed.shards import by_layout, local, row_range
from switchtitan.methods.lowrank import LowRankLinear
from switchtitan.methods.switchlora.freeze import SIDE_A, SIDE_B, VectorSpan
from switchtitan.optim import AdamWConfig

Update = Callable[..., None]

_CHUNK_SIZE = 8
"""The most factors that one call updates. Calling a compiled function takes some 40 us, as long as the update of a small factor
itself; compiling takes longer the more factors there are in a call."""


class _Chunk(NamedTuple):
    """Factors of one shape, updated in one call."""

    side: int
    layers: list[int]
    exp_avg: list[Tensor]
    """This rank's parts, as is `exp_avg_sq`."""
    exp_avg_sq: list[Tensor]


class VectorAdamW:
    """AdamW on A and B of all layers; bias corrections count each vector's own steps (SwitchLoRA, arXiv 2406.06564, sec. 3).

    Equals torch's AdamW as long as no vector is reset or held still.

    Args:
        layers: by qualified name, all of one rank.
        compile_step: fuse the update of a factor into one kernel, several factors in a call.

    Attributes:
        num_steps: [2, layers, rank] fp32, updates that each vector has seen, frozen ones included; the same on every rank.
    """

    def __init__(self, config: AdamWConfig, layers: dict[str, LowRankLinear], compile_step: bool) -> None:
        self._config = config
        factors = [layer.lora_a for layer in layers.values()], [layer.lora_b for layer in layers.values()]
        self._names = (
            [f"{name}.lora_a" for name in layers],
            [f"{name}.lora_b" for name in layers],
        )
        self._factors = factors
        self._exp_avg = tuple([torch.zeros_like(p, requires_grad=False) for p in side] for side in factors)
        self._exp_avg_sq = tuple([torch.zeros_like(p, requires_grad=False) for p in side] for side in factors)
        first = factors[0][0]
        self.num_steps = torch.zeros(2, len(layers), first.shape[0], device=first.device)
        # A tensor: a compiled update would be compiled anew for every Python number.
        self._lr = torch.tensor(config.lr, dtype=first.dtype, device=first.device)
        self._chunks = self._same_shaped_chunks()
        in_order = [(chunk.side, layer) for chunk in self._chunks for layer in chunk.layers]
        self._table_order = torch.tensor(
            [side * len(layers) + layer for side, layer in in_order], device=first.device, dtype=torch.int64
        )
        self._update: Update = (
            torch.compile(update_vectors_, fullgraph=True, dynamic=False) if compile_step else update_vectors_
        )

    def set_lr(self, lr_factor: float) -> None:
        self._lr.fill_(self._config.lr * lr_factor)

    @torch.no_grad()
    def reset_(self, spans: list[VectorSpan]) -> None:
        """Forgets what these vectors' moments and step counts hold."""
        counts = [span.view(self.num_steps) for span in spans]
        _zero_all_(counts + _vectors_of(self._exp_avg, spans) + _vectors_of(self._exp_avg_sq, spans))

    @torch.no_grad()
    def reset_first_moments_(self, spans: list[VectorSpan]) -> None:
        """Forgets what these vectors' first moments hold, and nothing else."""
        _zero_all_(_vectors_of(self._exp_avg, spans))

    @torch.no_grad()
    def step(self, moving: Tensor) -> None:
        """Updates every vector.

        Args:
            moving: [2, layers, rank] bool; a vector where it is false gets a gradient of zero and does not move at all, weight
                decay included, while its step count goes on.
        """
        beta1, beta2 = self._config.betas
        self.num_steps += 1
        coefficients = self._coefficients(moving).flatten(1, 2)[:, self._table_order]
        position = 0
        for chunk in self._chunks:
            of_chunk = coefficients[:, position : position + len(chunk.layers)]
            position += len(chunk.layers)
            factors = [self._factors[chunk.side][layer] for layer in chunk.layers]
            self._update(
                [local(factor) for factor in factors],
                [local(self._gradient(chunk.side, layer)) for layer in chunk.layers],
                chunk.exp_avg,
                chunk.exp_avg_sq,
                _beside(of_chunk, factors[0], chunk.side),
                beta1=beta1,
                beta2=beta2,
            )

    def _coefficients(self, moving: Tensor) -> Tensor:
        """What each vector's update takes, [4, 2, layers, rank].

        With n the vector's steps: 1 where it moves, else 0; lr sqrt(1 - beta2^n) / (1 - beta1^n), 0 where frozen;
        eps sqrt(1 - beta2^n); 1 - lr * weight_decay, 1 where frozen. Both bias corrections are in the step's size, which spares
        a division of every element.
        """
        beta1, beta2 = self._config.betas
        num_steps = self.num_steps.to(self._lr.dtype)
        root_corrections = (1 - beta2**num_steps).sqrt()
        step_sizes = self._lr * root_corrections / (1 - beta1**num_steps)
        kept = 1 - self._lr * self._config.weight_decay * moving
        return torch.stack(
            [moving.to(self._lr.dtype), step_sizes * moving, self._config.eps * root_corrections, kept]
        )

    def _same_shaped_chunks(self) -> list["_Chunk"]:
        """All factors that this rank holds a part of; chunks of one shape are of one size, so that they share a graph."""
        layers_of: dict[tuple[int, torch.Size], list[int]] = {}
        for side, factors in enumerate(self._factors):
            for layer, factor in enumerate(factors):
                if local(factor).numel() > 0:
                    layers_of.setdefault((side, local(factor).shape), []).append(layer)
        chunks = []
        for (side, _), layers in layers_of.items():
            size = _largest_divisor(len(layers), _CHUNK_SIZE)
            for start in range(0, len(layers), size):
                of_chunk = layers[start : start + size]
                exp_avg = [local(self._exp_avg[side][layer]) for layer in of_chunk]
                exp_avg_sq = [local(self._exp_avg_sq[side][layer]) for layer in of_chunk]
                chunks.append(_Chunk(side, of_chunk, exp_avg, exp_avg_sq))
        return chunks

    def _gradient(self, side: int, layer: int) -> Tensor:
        grad = self._factors[side][layer].grad
        assert grad is not None, f"no gradient for {self._names[side][layer]}"
        return grad

    def zero_grad(self) -> None:
        for factors in self._factors:
            for factor in factors:
                factor.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """`<layer>.lora_a.exp_avg` and so on, like the factors."""
        return {
            f"{name}.{key}": tensor
            for side in (SIDE_A, SIDE_B)
            for key, moments in (("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq))
            for name, tensor in zip(self._names[side], moments[side], strict=True)
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
    """One AdamW update (arXiv 1711.05101, Algorithm 2) of factors of one shape, with coefficients for each vector.

    Args:
        parameters, exp_avgs, exp_avg_sqs: [rank, in] for A, [out, rank] for B, or shards; changed in place.
        coefficients: [4, factors, rank, 1] for A, [4, factors, 1, rank] for B; see `VectorAdamW._coefficients`.
    """
    for index, (parameter, grad, exp_avg, exp_avg_sq) in enumerate(
        zip(parameters, grads, exp_avgs, exp_avg_sqs, strict=True)
    ):
        moving, step_sizes, eps, kept = coefficients[:, index].unbind()
        # A product, since a mask of booleans is slow where vectors are columns.
        grad = grad * moving
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        parameter.mul_(kept).addcdiv_(exp_avg * step_sizes, exp_avg_sq.sqrt().add_(eps), value=-1)


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _beside(coefficients: Tensor, factor: Tensor, side: int) -> Tensor:
    """Coefficients [..., rank] shaped to broadcast over this rank's part of a factor."""
    if side == SIDE_B:
        return coefficients.unsqueeze(-2)
    held = row_range(factor)
    return coefficients[..., held.start : held.stop].unsqueeze(-1)


def _vectors_of(moments: tuple[list[Tensor], ...], spans: list[VectorSpan]) -> list[Tensor]:
    """Of moments by side and layer, the parts of these vectors that this rank holds."""
    return [_local_vectors(moments[span.side][span.layer], span) for span in spans]


def _zero_all_(tensors: list[Tensor]) -> None:
    """In few operations; see `by_layout`."""
    for (alike,) in by_layout(tensors):
        torch._foreach_zero_(alike)


def _local_vectors(moments: Tensor, span: VectorSpan) -> Tensor:
    """The vectors of a span in this rank's part, a view; empty where it holds none."""
    part = local(moments)
    if span.side == SIDE_B:
        return part[:, span.vectors.start : span.vectors.stop]
    held = row_range(moments)
    start = min(max(span.vectors.start - held.start, 0), len(held))
    stop = min(max(span.vectors.stop - held.start, 0), len(held))
    return part[start:stop]
