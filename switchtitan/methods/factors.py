"""The method low_rank: without a frozen weight, every targeted layer is a product B A."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.distributed.initial import GeneratorFor
from switchtitan.methods.adapter.linear import take
from switchtitan.methods.projected import is_right, leading_singular_vectors
from switchtitan.methods.targets import (
    FACTORS,
    FactorLinear,
    ReplacingMethod,
    TargetConfig,
    TargetConfigT,
)


class PlainProductConfig(TargetConfig):
    """`[method] name = "low_rank"`: W = B A, without the frozen weight of LoRA. B A starts as the
    best approximation of the layer's usual initial weight (truncated SVD; "spectral initialization"
    in arXiv 2105.01029). Ranks share the decompositions, on their CPUs. `[checkpoint]
    initial_weights` are approximated in the same way."""

    keeps_initial_weights: ClassVar[bool] = False
    name: Literal["low_rank"] = "low_rank"
    """The method."""


class ProductLinear(FactorLinear):
    """y = x (B A)^T (+ bias)."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__(linear.in_features, linear.out_features, rank, linear.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return F.linear(F.linear(x, self.lora_a), self.lora_b.t(), self.bias)

    def initial_tensors(
        self, weight: Tensor, generator_for: GeneratorFor, rows: Mapping[str, range]
    ) -> dict[str, Tensor]:
        # A decomposition needs all rows of the weight.
        parts = self.initial_parts(weight)
        return {name: take(part, rows[name]) for name, part in parts.items() if name in rows}

    def dense_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors["lora_b"].t() @ tensors["lora_a"]

    def initial_parts(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns its initial parameters by local name, from the plain weight [out, in]."""
        return dict(zip(FACTORS, balanced_factors(weight, self.rank), strict=True))


class ProductMethod(ReplacingMethod[TargetConfigT]):
    """Linear layers become a `ProductLinear` or a subclass; all parameters train."""

    def build_layer(self, name: str, linear: nn.Linear) -> ProductLinear:
        return ProductLinear(linear, self.config.rank)

    def starting_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns the weight of a layer's initial parts, for layers with factors."""
        layer, _, local_name = name.rpartition(".")
        if local_name != "weight" or not self.config.is_target(layer):
            return weight
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            replacement = self.build_layer(layer, plain)
        return replacement.dense_weight(replacement.initial_parts(weight))


def balanced_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns factors whose product is the best approximation of a weight [out, in] by rank.

    A = sqrt(S) V^T and B^T = sqrt(S) U^T with the leading `rank` singular values and vectors
    ("spectral initialization", arXiv 2105.01029), [rank, in] and [rank, out] in the dtype of the
    weight. Decomposed in fp64 on its device.
    """
    matrix = weight.to(torch.float64)
    basis = leading_singular_vectors(matrix, rank)
    # Rows are S U^T if the basis is V, otherwise S V^T.
    scaled = (matrix @ basis).t() if is_right(matrix) else basis.t() @ matrix
    roots = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).sqrt()
    # A weight of a lower rank has singular values of zero.
    other = scaled / roots.clamp(min=torch.finfo(roots.dtype).tiny)
    factors = (basis.t() * roots, other) if is_right(matrix) else (other, basis.t() * roots)
    lora_a, lora_b = (factor.to(weight.dtype).contiguous() for factor in factors)
    return lora_a, lora_b
