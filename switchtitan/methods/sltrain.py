"""SLTrain (arXiv 2406.02214): every targeted layer is a product B A plus a sparse matrix."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from switchtitan.distributed.initial import GeneratorFor
from switchtitan.methods.factors import ProductLinear, ProductMethod
from switchtitan.methods.operations import copy_in_backward, define, part_of
from switchtitan.methods.targets import FACTORS, TargetConfig
from switchtitan.numerics.random import generator_for, splitmix64

SPARSE = "sparse_values"
"""Local name of the parameter with the values of the sparse matrix."""
_NUM_BITS = 31
"""Random bits for each column of the support."""


class SltrainConfig(TargetConfig):
    """`[method] name = "sltrain"`: W = B A + S (SLTrain, arXiv 2406.02214). S is sparse, with
    random positions that never change. B A starts as the best approximation of the layer's usual
    initial weight (truncated SVD; ranks share these, on their CPUs), and S starts as the residual
    at its positions. `[checkpoint] initial_weights` are split in the same way. S trains with AdamW
    if `[optimizer] name` is `muon` or `scale`, and with fp32 moments if these are in 8 bits.
    Differences from the authors' method: there is no factor alpha / rank, B does not start at zero,
    and each row is divided into equal parts with one value of S in each."""

    keeps_initial_weights: ClassVar[bool] = False
    name: Literal["sltrain"] = "sltrain"
    """The method."""
    density: float = Field(default=0.03, gt=0, lt=1)
    """Number of values in a row of S divided by the length of the row, above 0 and below 1. It is
    rounded to a whole number of values, at least one."""


class SparseProductLinear(ProductLinear):
    """y = x (B A + S)^T (+ bias).

    S [out, in] has k values in each row, in the columns `support(...)`. `sparse_values` [out * k]
    has them row by row, in one dimension, so that optimizers do not take it for a linear map.

    Args:
        density: k / in, rounded to a whole k of at least 1.
        seed: of the columns, an integer below 2^63.
    """

    support_seed: Tensor

    def __init__(self, linear: nn.Linear, rank: int, density: float, seed: int) -> None:
        super().__init__(linear, rank)
        self.num_per_row = max(1, round(density * self.in_features))
        self.sparse_values = nn.Parameter(torch.empty(self.out_features * self.num_per_row))
        # A tensor: torch.compile would compile every layer by itself for a number of its own.
        self.register_buffer("support_seed", torch.empty(1, dtype=torch.int64), persistent=False)
        self._seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        parts = self.lora_a, self.lora_b, self.sparse_values
        out = _SparseProduct.apply(x, *parts, self.support_seed)
        return out if self.bias is None else out + self.bias

    def initial_tensors(
        self, weight: Tensor, generator_for: GeneratorFor, rows: Mapping[str, range]
    ) -> dict[str, Tensor]:
        tensors = {"support_seed": torch.tensor([self._seed])}
        if rows.keys() & {*FACTORS, SPARSE}:
            tensors |= super().initial_tensors(weight, generator_for, rows)
        return tensors

    def dense_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        lora_a, lora_b, values = (tensors[name] for name in (*FACTORS, SPARSE))
        seed = torch.tensor([self._seed], device=values.device)
        return _dense(lora_a, lora_b, values, _columns(lora_a, lora_b, values, seed))

    def initial_parts(self, weight: Tensor) -> dict[str, Tensor]:
        """B A is the best approximation by rank; S has the rest of the weight at its positions."""
        parts = super().initial_parts(weight)
        seed = torch.tensor([self._seed], device=weight.device)
        columns = support(seed, self.out_features, self.in_features, self.num_per_row)
        rest = (weight - parts["lora_b"].t() @ parts["lora_a"]).gather(1, columns)
        return {**parts, SPARSE: rest.flatten()}


class Sltrain(ProductMethod[SltrainConfig]):
    """The weight of each layer is the product of its factors plus a sparse matrix."""

    def build_layer(self, name: str, linear: nn.Linear) -> SparseProductLinear:
        config, seed = self.config, generator_for(self.seed, f"{name}.support").initial_seed()
        return SparseProductLinear(linear, config.rank, config.density, seed)


def support(seed: Tensor, out_features: int, in_features: int, num_per_row: int) -> Tensor:
    """Returns the columns of a sparse matrix's values, [out, values per row] int64, ascending.

    A row is cut into as many parts as it has values, of lengths that differ by at most one; each
    has one value, at a random position. A function of the arguments alone, on every device; `seed`
    is [1] int64, at least 0.
    """
    draws = splitmix64(seed, torch.arange(out_features * num_per_row, device=seed.device))
    random = ((draws >> (64 - _NUM_BITS)) & ((1 << _NUM_BITS) - 1)).view(out_features, num_per_row)
    ends = torch.arange(num_per_row + 1, device=seed.device) * in_features // num_per_row
    starts = ends[:-1]
    return starts + ((random * (ends[1:] - starts)) >> _NUM_BITS)


# Opaque to torch.compile, whose integers do not wrap around.
_support = define(
    "support(Tensor seed, int out_features, int in_features, int num_per_row)", support
)


def _dense(lora_a: Tensor, lora_b: Tensor, sparse_values: Tensor, columns: Tensor) -> Tensor:
    """Computes B A + S [out, in] in the dtype of the factors."""
    # An `addmm`, which selective recomputation does not save, as it does a product of activations.
    product = torch.addmm(lora_b.new_zeros(1, 1), lora_b.t(), lora_a, beta=0)
    # The columns of a row are distinct, so this is a sum, and the same on every run.
    return product.scatter_(1, columns, product.gather(1, columns) + sparse_values.view_as(columns))


def _columns(lora_a: Tensor, lora_b: Tensor, sparse_values: Tensor, seed: Tensor) -> Tensor:
    """Returns `support` of a layer's parameters."""
    out_features, in_features = lora_b.shape[1], lora_a.shape[1]
    return _support(seed, out_features, in_features, sparse_values.numel() // out_features)


class _SparseProduct(torch.autograd.Function):
    """Multiplies by B A + S. Saves its inputs alone: the backward pass computes B A + S again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, sparse_values: Tensor, seed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, lora_a, lora_b, sparse_values, seed)
        columns = _columns(lora_a, lora_b, sparse_values, seed)
        return F.linear(x, _dense(lora_a, lora_b, sparse_values, columns))

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        x, lora_a, lora_b, sparse_values, seed = ctx.saved_tensors
        # Otherwise torch.compile would save the columns.
        columns = _columns(lora_a, lora_b, sparse_values, copy_in_backward(seed, part_of(grad)))
        grad_x = None
        if ctx.needs_input_grad[0]:
            factor = copy_in_backward(lora_b, part_of(grad))
            grad_x = grad @ _dense(lora_a, factor, sparse_values, columns)
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        grad_values = grad_weight.gather(1, columns).flatten()
        return grad_x, lora_b @ grad_weight, lora_a @ grad_weight.t(), grad_values, None
