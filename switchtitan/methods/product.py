"""Low rank without a frozen weight: every adapted layer is a product B A."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import (
    LanguageModel,
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.distributed.initial import GeneratorFor
from switchtitan.methods.lowrank.config import ADAPTED_LINEARS, Targets, check_rank
from switchtitan.methods.lowrank.linear import replace_linears, take
from switchtitan.methods.lowrank.method import FACTORS, parameters_with_factors
from switchtitan.methods.projected import is_right, leading_singular_vectors
from switchtitan.optim import OPTIMIZERS, TrainedParameter


class ProductConfig(MethodConfig):
    """The keys of all methods whose layers have factors and no frozen weight."""

    keeps_initial_weights: ClassVar[bool] = False
    rank: int = Field(ge=1)
    """Number of vectors in each factor: at least 1, and below the smaller dimension of every
    adapted layer."""
    targets: Targets = ADAPTED_LINEARS
    """Local names of the linear layers to factorize; by default all of attention and MLP. All other
    parameters train at full rank."""

    def draws_in_forward(self) -> bool:
        """See `contracts.MethodConfig`."""
        return False

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """See `contracts.MethodConfig`."""
        return check_rank(self.rank, self.targets, linear_shapes)


class PlainProductConfig(ProductConfig):
    """`[method] name = "low_rank"`: W = B A, without the frozen weight of LoRA. B A starts as the
    best approximation of the layer's usual initial weight (truncated SVD, computed by every process
    on its CPU; "spectral initialization" in arXiv 2105.01029). `[checkpoint] initial_weights` are
    approximated in the same way."""

    name: Literal["low_rank"] = "low_rank"
    """The method."""


class ProductLinear(nn.Module):
    """y = x (B A)^T (+ bias).

    Shapes: `lora_a` [rank, in], `lora_b` [rank, out]. B is stored transposed, as in
    `lowrank.LowRankLinear`.
    """

    sharded_buffers: tuple[str, ...] = ()
    host_buffers: tuple[str, ...] = ()

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.plain_shape = (self.out_features, self.in_features)
        self.rank = rank
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features))
        self.lora_b = nn.Parameter(torch.empty(rank, self.out_features))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(self.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        # The fewest operations, as long as the factors have fewer elements than B A.
        return F.linear(F.linear(x, self.lora_a), self.lora_b.t(), self.bias)

    def initial_tensors(
        self,
        weight: Tensor,
        generator_for: GeneratorFor,
        rows: Mapping[str, range] | None = None,
    ) -> dict[str, Tensor]:
        """See `contracts.Reparametrized`. A decomposition needs all rows of the weight."""
        parts = self.initial_parts(weight)
        if rows is None:
            return parts
        return {name: take(part, rows[name]) for name, part in parts.items() if name in rows}

    def initial_parts(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns its initial parameters by local name, from the plain weight [out, in]."""
        return dict(zip(FACTORS, balanced_factors(weight, self.rank), strict=True))

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}"


ProductSection = TypeVar("ProductSection", bound=ProductConfig)
"""The configuration class of a method with products."""


class ProductMethod(Method[ProductSection]):
    """Linear layers become a `ProductLinear` or a subclass; all parameters train."""

    @abstractmethod
    def build_layer(self, name: str, linear: nn.Linear) -> ProductLinear:
        """Returns the layer that replaces `linear`, by its qualified name."""

    @abstractmethod
    def dense_weight(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight [out, in] of a layer, from its parameters by local name."""

    def trained_parameters(self, model: LanguageModel) -> list[TrainedParameter]:
        """Returns all parameters; those treated are the factors."""
        layers = [name for name, module in model.named_modules() if _is_product(module)]
        return parameters_with_factors(model, layers)

    def prepare_model(self, model: nn.Module) -> None:
        """Replaces every targeted linear layer."""
        replace_linears(model, self.config.targets, self.build_layer)

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        return OPTIMIZERS.build(config, self.trained_parameters(model), compile_step, self.seed)

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the weights of layers with factors, and all other weights, in fp32."""
        first_factor = f".{FACTORS[0]}"
        parts: dict[str, dict[str, Tensor]] = {
            name.removesuffix(first_factor): {} for name in tensors if name.endswith(first_factor)
        }
        dense: dict[str, Tensor] = {}
        for name, tensor in super().dense_weights(tensors).items():
            layer, _, local_name = name.rpartition(".")
            if layer in parts and local_name != "bias":
                parts[layer][local_name] = tensor
            else:
                dense[name] = tensor
        made = {f"{layer}.weight": self.dense_weight(layer, parts[layer]) for layer in parts}
        return dense | made

    def starting_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns the weight of a layer's initial parts, for layers with factors."""
        layer, _, local_name = name.rpartition(".")
        if local_name != "weight" or layer.rpartition(".")[2] not in self.config.targets:
            return weight
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        return self.dense_weight(layer, self.build_layer(layer, plain).initial_parts(weight))


class PlainProduct(ProductMethod[PlainProductConfig]):
    """The weight of each layer is the product of its factors."""

    def build_layer(self, name: str, linear: nn.Linear) -> ProductLinear:
        return ProductLinear(linear, self.config.rank)

    def dense_weight(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        lora_a, lora_b = (parts[factor] for factor in FACTORS)
        return lora_b.t() @ lora_a


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, ProductLinear)


def balanced_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns factors whose product is the best approximation of a weight [out, in] by rank.

    A = sqrt(S) V^T and B^T = sqrt(S) U^T with the leading `rank` singular values and vectors
    ("spectral initialization", arXiv 2105.01029). Decomposed in fp64 on the weight's device.

    Returns:
        A [rank, in] and B transposed, [rank, out], in the dtype of the weight.
    """
    matrix = weight.to(torch.float64)
    basis = leading_singular_vectors(matrix, rank)
    # Rows are S U^T if the basis is V, otherwise S V^T.
    scaled = (matrix @ basis).t() if is_right(matrix) else basis.t() @ matrix
    roots = torch.linalg.vector_norm(scaled, dim=1, keepdim=True).sqrt()
    # A weight of a lower rank has singular values of zero.
    of_basis, of_other = basis.t() * roots, scaled / roots.clamp(min=torch.finfo(roots.dtype).tiny)
    lora_a, lora_b = (of_basis, of_other) if is_right(matrix) else (of_other, of_basis)
    return lora_a.to(weight.dtype).contiguous(), lora_b.to(weight.dtype).contiguous()
