"""SLTrain (arXiv 2406.02214): every adapted layer is a product B A plus a sparse matrix."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import LanguageModel, Method, OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.initial_draws import GeneratorFor
from switchtitan.distributed.seeds import generator_for, splitmix64
from switchtitan.methods.low_rank import ProductConfig, ProductLinear, balanced_factors
from switchtitan.methods.lowrank.contraction import copy_in_backward
from switchtitan.methods.lowrank.linear import replace_linears, take
from switchtitan.methods.lowrank.method import FACTORS, parameters_with_factors
from switchtitan.optim import OPTIMIZERS

SPARSE = "sparse_values"
"""Local name of the parameter with the values of the sparse matrix."""
_NUM_BITS = 31
"""Random bits for each entry of the support."""


class SltrainConfig(ProductConfig):
    """`[method] name = "sltrain"`: SLTrain (arXiv 2406.02214), W = B A + S. S is sparse, and the
    places of its values are random and do not change. Initially, B A is the best approximation of
    the plain layer's initial weight, and S is what is missing at its places; the authors set B to
    zero and draw A and S at random. All rows of S have the same number of values, one in each of as
    many equal parts of the row; the authors draw the places from the entire matrix."""

    name: Literal["sltrain"] = "sltrain"
    """The method."""
    density: float = Field(default=0.03, gt=0, lt=1)
    """Share of the values of S that are not zero, above 0 and below 1; at least one value in each
    row."""


class SparseProductLinear(ProductLinear):
    """y = x (B A + S)^T (+ bias).

    S [out, in] has k values in each row, at `support(...)`. `sparse_values` [out k] has them row by
    row. It has one dimension because it is no matrix of a linear map, so that optimizers that treat
    matrices leave it alone.

    Args:
        linear: the layer that it replaces.
        density: k / in, rounded to a whole k of at least 1.
        support_seed: of the places, an integer below 2^63.
    """

    def __init__(self, linear: nn.Linear, rank: int, density: float, support_seed: int) -> None:
        super().__init__(linear, rank)
        self.num_per_row = _num_per_row(density, self.in_features)
        self.sparse_values = nn.Parameter(torch.empty(self.out_features * self.num_per_row))
        self._support_seed = support_seed

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        out = _SparseProduct.apply(
            x, self.lora_a, self.lora_b, self.sparse_values, self._support_seed
        )
        return out if self.bias is None else out + self.bias

    def initial_tensors(
        self,
        weight: Tensor,
        generator_for: GeneratorFor,
        rows: Mapping[str, range] | None = None,
    ) -> dict[str, Tensor]:
        """See `contracts.Reparametrized`. A decomposition needs all rows of the weight."""
        rows = rows or {name: range(len(tensor)) for name, tensor in self.named_parameters()}
        parts = _initial_parts(weight, self.rank, self.num_per_row, self._support_seed)
        return {name: take(tensor, rows[name]) for name, tensor in parts.items()}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, values_per_row={self.num_per_row}"


class Sltrain(Method[SltrainConfig]):
    """Linear layers become `SparseProductLinear`; all parameters train."""

    def prepare_model(self, model: nn.Module) -> None:
        """Replaces every targeted linear layer."""
        replace_linears(
            model,
            self.config.targets,
            lambda name, linear: SparseProductLinear(
                linear, self.config.rank, self.config.density, self._support_seed(name)
            ),
        )

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        layers = [
            name
            for name, module in model.named_modules()
            if isinstance(module, SparseProductLinear)
        ]
        sparse = {f"{layer}.{SPARSE}" for layer in layers}
        trained = [
            entry._replace(is_other=False) if entry.name in sparse else entry
            for entry in parameters_with_factors(model, layers)
        ]
        return OPTIMIZERS.build(config, trained, compile_step, self.seed)

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns B A + S for layers with factors, and all other tensors, in fp32."""
        dense = super().dense_weights(tensors)
        for name in tensors:
            layer, _, local_name = name.rpartition(".")
            if local_name == SPARSE:
                parts = {part: dense.pop(f"{layer}.{part}") for part in (*FACTORS, SPARSE)}
                dense[f"{layer}.weight"] = _dense(**parts, support_seed=self._support_seed(layer))
        return dense

    def starting_weight(self, name: str, weight: Tensor) -> Tensor:
        """Returns the weight that the layer's initial tensors give, for layers with factors."""
        layer, _, local_name = name.rpartition(".")
        if local_name != "weight" or layer.rpartition(".")[2] not in self.config.targets:
            return weight
        num_per_row = _num_per_row(self.config.density, weight.shape[1])
        seed = self._support_seed(layer)
        return _dense(
            **_initial_parts(weight, self.config.rank, num_per_row, seed), support_seed=seed
        )

    def _support_seed(self, layer: str) -> int:
        return generator_for(self.seed, f"{layer}.support").initial_seed()


def _num_per_row(density: float, in_features: int) -> int:
    return max(1, round(density * in_features))


def support(shape: tuple[int, int], num_per_row: int, seed: int, device: torch.device) -> Tensor:
    """Returns the columns of a sparse matrix's values, [out, values per row] int64.

    A row is cut into as many parts as it has values, of sizes that differ by at most one, and each
    part has one value, at a random place. A function of the arguments alone, on every device.

    Args:
        shape: (out, in) of the matrix.
        seed: below 2^63.
    """
    out_features, in_features = shape
    indices = torch.arange(out_features * num_per_row, device=device)
    draws = splitmix64(torch.full((1,), seed, dtype=torch.int64, device=device), indices)
    random = ((draws >> (64 - _NUM_BITS)) & ((1 << _NUM_BITS) - 1)).view(out_features, num_per_row)
    ends = torch.arange(num_per_row + 1, device=device) * in_features // num_per_row
    starts = ends[:-1]
    return starts + ((random * (ends[1:] - starts)) >> _NUM_BITS)


def _initial_parts(
    weight: Tensor, rank: int, num_per_row: int, support_seed: int
) -> dict[str, Tensor]:
    """Returns a layer's initial parameters, by local name, from the plain weight [out, in]."""
    lora_a, lora_b = balanced_factors(weight, rank)
    columns = support(_shape_of(weight), num_per_row, support_seed, weight.device)
    missing = (weight - lora_b.t() @ lora_a).gather(1, columns)
    return dict(zip((*FACTORS, SPARSE), (lora_a, lora_b, missing.flatten()), strict=True))


def _dense(lora_a: Tensor, lora_b: Tensor, sparse_values: Tensor, support_seed: int) -> Tensor:
    """Computes B A + S [out, in] in the dtype of the factors."""
    product = lora_b.t() @ lora_a
    columns = _columns(product, sparse_values, support_seed)
    # As there is one value at a place, this is a sum, and deterministic on every device.
    return product.scatter_(1, columns, product.gather(1, columns) + sparse_values.view_as(columns))


def _columns(matrix: Tensor, sparse_values: Tensor, support_seed: int) -> Tensor:
    num_per_row = sparse_values.numel() // matrix.shape[0]
    return support(_shape_of(matrix), num_per_row, support_seed, matrix.device)


def _shape_of(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


class _SparseProduct(torch.autograd.Function):
    """Multiplies by B A + S. Saves its inputs alone: the backward pass adds them up again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        sparse_values: Tensor,
        support_seed: int,
    ) -> Tensor:
        ctx.save_for_backward(x, lora_a, lora_b, sparse_values)
        ctx.support_seed = support_seed
        return F.linear(x, _dense(lora_a, lora_b, sparse_values, support_seed))

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None]:
        x, lora_a, lora_b, sparse_values = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            factor = copy_in_backward(lora_b, grad)
            grad_x = grad @ _dense(lora_a, factor, sparse_values, ctx.support_seed)
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        columns = _columns(grad_weight, sparse_values, ctx.support_seed)
        grad_values = grad_weight.gather(1, columns).flatten()
        return grad_x, lora_b @ grad_weight, lora_a @ grad_weight.t(), grad_values, None
