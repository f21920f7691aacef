"""The layer with a frozen weight and factors, and the initial values of its factors."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.contracts import TrainedModel
from switchtitan.distributed.initial import GeneratorFor, split_blocks
from switchtitan.methods.adapter.contraction import Contraction, cheapest_contraction, frozen_linear
from switchtitan.methods.targets import FACTORS, FactorLinear
from switchtitan.numerics.random import draw_vectors


class AdapterLinear(FactorLinear):
    """y = x (W + s B A)^T (+ bias) with W, `weight` [out, in], frozen.

    Computes in the dtype of autocast if that is on, or else of x; tensors of another are cast.

    Args:
        scale: s.
        bounds: of the uniform distributions that A and B are drawn from at the start.
        dropout: dropout probability for the input of A.
        contraction: how to compute the layer without dropout; by default the cheapest for x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        bounds: tuple[float, float],
        *,
        bias: bool = False,
        dropout: float = 0.0,
        contraction: Contraction | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, bias)
        self.scale, self.bounds, self.dropout = scale, bounds, dropout
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self._contraction = contraction

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if not (self.dropout and self.training):
            return self._contract(x, [self])[0]
        x, lora_a, lora_b = in_compute_dtype(x, self.lora_a, self.lora_b)
        low_rank = F.linear(F.linear(F.dropout(x, self.dropout), lora_a), lora_b.t())
        return self._with_bias(frozen_linear(x, self.weight) + low_rank * self.scale)

    def forward_together(self, x: Tensor, others: Sequence[nn.Module]) -> tuple[Tensor, ...]:
        alike = [other for other in others if self._is_alike(other)]
        # Fewer bytes, not fewer operations, which decide on a CPU.
        is_cheaper = x.is_cuda or self._contraction is not None
        if not alike or len(alike) < len(others) or not is_cheaper:
            return super().forward_together(x, others)
        return self._contract(x, [self, *alike])

    def _contract(self, x: Tensor, layers: Sequence["AdapterLinear"]) -> tuple[Tensor, ...]:
        factors = (factor for layer in layers for factor in (layer.lora_a, layer.lora_b))
        x, *cast = in_compute_dtype(x, *factors)
        contraction = self._contraction
        if contraction is None:
            out_features = tuple(layer.out_features for layer in layers)
            contraction = cheapest_contraction(x, out_features, self.rank)
        weights = [layer.weight for layer in layers]
        outputs = contraction(x, [*zip(weights, cast[::2], cast[1::2], strict=True)], self.scale)
        return tuple(layer._with_bias(out) for layer, out in zip(layers, outputs, strict=True))

    def _with_bias(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def _is_alike(self, other: nn.Module) -> TypeGuard["AdapterLinear"]:
        """Whether this and the other may be computed together."""
        return (
            isinstance(other, AdapterLinear)
            and (self.rank, self.scale) == (other.rank, other.scale)
            and not (self.training and (self.dropout or other.dropout))
        )

    def initial_slots(self) -> tuple[Tensor, Tensor]:
        """Returns which of the random vectors of its factor each vector of A and B is, [rank]."""
        return torch.arange(self.rank), torch.arange(self.rank)

    def initial_tensors(
        self, weight: Tensor, generator_for: GeneratorFor, rows: Mapping[str, range]
    ) -> dict[str, Tensor]:
        """Returns values with which W + s B A is the plain layer's weight."""
        lora_a, lora_b = (
            # Rounded as they are stored.
            self.draw(factor, slots, generator_for).to(self.lora_a.dtype).to(weight.dtype)
            for factor, slots in zip(FACTORS, self.initial_slots(), strict=True)
        )
        if self.bounds[1]:
            weight = without_update(weight, rows["weight"], lora_a, lora_b, self.scale)
        return {
            "weight": weight,
            "lora_a": take(lora_a, rows["lora_a"]),
            "lora_b": take(lora_b, rows["lora_b"]),
        }

    def dense_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        lora_a, lora_b = tensors["lora_a"], tensors["lora_b"]
        return torch.addmm(tensors["weight"], lora_b.t(), lora_a, alpha=self.scale)

    def draw(self, factor: str, slots: Tensor, generator_for: GeneratorFor) -> Tensor:
        """Returns the factor's random vectors number `slots`, [slots, width] fp32."""
        key = torch.tensor(generator_for(factor).initial_seed())
        width, bound = self.get_parameter(factor).shape[1], self.bounds[FACTORS.index(factor)]
        return draw_vectors(key, slots, width, bound)


def in_compute_dtype(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    """Returns x and factors in the dtype of autocast if that is on, or else of x."""
    kind, dtype = x.device.type, x.dtype
    if not x.is_meta and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return tuple(tensor.to(dtype) for tensor in (x, *factors))


def adapter_layers(model: TrainedModel) -> dict[str, AdapterLinear]:
    """Returns the adapters of a model by qualified name, in the model's order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)
    }


def lora_bounds(out_features: int, in_features: int, rank: int) -> tuple[float, float]:
    """Returns LoRA's bounds of A and B (arXiv 2106.09685): B is zero, and A is Kaiming-uniform with
    a = sqrt 5, of bound sqrt(6 / ((1 + a^2) in)) = 1/sqrt(in)."""
    return 1 / math.sqrt(in_features), 0.0


def balanced_bounds(out_features: int, in_features: int, rank: int) -> tuple[float, float]:
    """Returns the bounds of A and B that balance the gradients of both factors.

    sqrt(3) times the standard deviations of SwitchLoRA's initialization (arXiv 2406.06564):
    std_A = (rank sqrt(out) / in^(3/2))^(1/4) sqrt(gain), std_B = (rank / sqrt(out in))^(1/4)
    sqrt(gain), with the gain of a leaky ReLU of slope sqrt(5), as for linear layers.
    """
    root_of_gain = math.sqrt(1 / math.sqrt(3))
    std_a = (rank * math.sqrt(out_features) / in_features**1.5) ** 0.25 * root_of_gain
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * root_of_gain
    return math.sqrt(3) * std_a, math.sqrt(3) * std_b


def without_update(
    weight: Tensor, rows: range, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """Returns `weight` - s B A, block by block, so that bits do not depend on the number of ranks.

    Args:
        weight: rows `rows` of W [out, in], complete blocks of `distributed.initial`.
        lora_a, lora_b: [rank, in] and [rank, out].
    """
    result = torch.empty_like(weight)
    for block in split_blocks((lora_b.shape[1], lora_a.shape[1]), rows):
        own = slice(block.start - rows.start, block.stop - rows.start)
        columns = take(lora_b.t(), block)
        torch.addmm(weight[own], columns, lora_a, alpha=-scale, out=result[own])
    return result


def take(tensor: Tensor, rows: range) -> Tensor:
    """Returns a view of consecutive rows."""
    return tensor[rows.start : rows.stop]
