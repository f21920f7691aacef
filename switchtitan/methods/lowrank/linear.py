"""The low-rank layer: a frozen dense weight plus the product of two trained factors."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchtitan.distributed.initial_draws import GeneratorFor, RandomRows, split_blocks
from switchtitan.errors import ConfigError
from switchtitan.methods.lowrank.config import LowRankConfig, check_targets
from switchtitan.methods.lowrank.contraction import (
    BY_NAME,
    Contraction,
    cheapest_contraction,
    frozen_linear,
)

GAIN = 1 / math.sqrt(3)
"""The gain of a leaky ReLU with slope sqrt(5), as in Kaiming-uniform initialization of linear
layers."""


LayerT = TypeVar("LayerT", bound=nn.Module)
"""The class of the layers that replace linear ones."""


class LayerShape(NamedTuple):
    """The numbers that a layer's initial values depend on."""

    out_features: int
    in_features: int
    rank: int
    scale: float


class InitialFactors(Protocol):
    """A function that computes a low-rank layer's initial tensors."""

    def __call__(
        self,
        weight: Tensor,
        shape: LayerShape,
        rows: Mapping[str, range],
        generator_for: GeneratorFor,
    ) -> dict[str, Tensor]:
        """Returns rows of a layer's tensors by local name, with W + s B A = the plain weight.

        Args:
            weight: rows `rows["weight"]` of the plain layer's weight [out, in].
            rows: local name -> the rows to return; of `weight`, complete blocks of `initial_draws`.
        """
        ...


class LayerBuffer(NamedTuple):
    """A buffer of a layer, sharded along dimension 0 like the parameters."""

    shape: tuple[int, int]
    dtype: torch.dtype | None = None
    """By default the dtype of the parameters."""
    is_on_host: bool = False
    """Whether it stays in host memory."""


class LowRankLinear(nn.Module):
    """y = x (W + s B A)^T (+ bias) with W frozen.

    Computes in the dtype of x and the factors; W may have another dtype. Shapes: `weight` [out,
    in], `lora_a` [rank, in], `lora_b` [rank, out]. B is stored transposed, so that the vectors of
    both factors are rows.

    Args:
        in_features, out_features: of the linear layer that it replaces.
        rank: number of vectors in each factor.
        scale: s.
        initial_factors: see `InitialFactors`.
        dropout: dropout probability for the input of A.
        buffers: buffers of the layer by local name.
        contraction: how to compute the layer without dropout; by default the cheapest for x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        initial_factors: InitialFactors,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        buffers: dict[str, LayerBuffer] | None = None,
        contraction: Contraction | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.scale, self.dropout = scale, dropout
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._initial_factors = initial_factors
        self._contraction = contraction
        self._layer_buffers = buffers or {}
        for name, buffer in self._layer_buffers.items():
            self.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.dropout and self.training:
            low_rank = F.linear(F.linear(F.dropout(x, self.dropout), self.lora_a), self.lora_b.t())
            out = frozen_linear(x, self.weight) + low_rank * self.scale
        else:
            contraction = self._contraction or cheapest_contraction(
                self.out_features, self.in_features, self.rank, x.numel() // self.in_features
            )
            out = contraction(x, self.weight, self.lora_a, self.lora_b, self.scale)
        return out if self.bias is None else out + self.bias

    def plain_shape(self) -> tuple[int, int]:
        """See `contracts.Reparametrized`."""
        return self.out_features, self.in_features

    def initial_tensors(
        self,
        weight: Tensor,
        generator_for: GeneratorFor,
        rows: Mapping[str, range] | None = None,
    ) -> dict[str, Tensor]:
        """See `contracts.Reparametrized`."""
        shape = LayerShape(self.out_features, self.in_features, self.rank, self.scale)
        tensors = (*self.named_parameters(), *self.named_buffers())
        rows = rows or {name: range(tensor.shape[0]) for name, tensor in tensors}
        return self._initial_factors(weight, shape, rows, generator_for)

    def sharded_buffers(self) -> tuple[str, ...]:
        """See `contracts.Reparametrized`."""
        return tuple(self._layer_buffers)

    def host_buffers(self) -> tuple[str, ...]:
        """See `contracts.Reparametrized`."""
        return tuple(name for name, buffer in self._layer_buffers.items() if buffer.is_on_host)

    def extra_repr(self) -> str:
        return (
            f"in={self.in_features}, out={self.out_features}, "
            f"rank={self.rank}, scale={self.scale:g}"
        )


def low_rank_layer_for(
    linear: nn.Linear,
    config: LowRankConfig,
    scale: float,
    initial_factors: InitialFactors,
    buffers: dict[str, LayerBuffer] | None = None,
) -> LowRankLinear:
    """Builds the layer that replaces `linear`, with rank, dropout and contraction of `config`."""
    return LowRankLinear(
        linear.in_features,
        linear.out_features,
        config.rank,
        scale,
        initial_factors,
        bias=linear.bias is not None,
        dropout=config.dropout,
        buffers=buffers,
        contraction=None if config.contraction == "cheapest" else BY_NAME[config.contraction],
    )


def replace_linears(
    model: nn.Module, targets: Iterable[str], build: Callable[[str, nn.Linear], LayerT]
) -> dict[str, LayerT]:
    """Replaces every `nn.Linear` whose local name is in `targets` by `build(name, linear)`.

    New layers are on the same device.

    Returns:
        The new layers by qualified name, in the model's order.

    Raises:
        ConfigError: if a target names no linear layer of the model.
    """
    targets = tuple(targets)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    if problems := check_targets(targets, linears):
        raise ConfigError(problems[0])
    replaced: dict[str, LayerT] = {}
    for name, linear in linears.items():
        parent_name, _, local_name = name.rpartition(".")
        if local_name in targets:
            # A model on the meta device must stay there: its full layers may not fit in memory.
            with linear.weight.device:
                replaced[name] = build(name, linear)
            setattr(model.get_submodule(parent_name), local_name, replaced[name])
    return replaced


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """Returns the low-rank layers of a model by qualified name, in the model's order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }


def lora_init(
    weight: Tensor, shape: LayerShape, rows: Mapping[str, range], generator_for: GeneratorFor
) -> dict[str, Tensor]:
    """Draws A uniformly within 1/sqrt(in), and sets B to zero. W is unchanged.

    (LoRA, arXiv 2106.09685, with Kaiming-uniform A, a = sqrt 5.) See `InitialFactors`.

    Returns:
        Rows of `weight` [out, in], `lora_a` [rank, in], `lora_b` [rank, out].
    """
    bound = lora_bound(shape.in_features)
    lora_a = random_vectors("lora_a", (shape.rank, shape.in_features), bound, generator_for)
    lora_b = torch.zeros(len(rows["lora_b"]), shape.out_features)
    return {"weight": weight, "lora_a": lora_a[rows["lora_a"]], "lora_b": lora_b}


def lora_bound(in_features: int) -> float:
    """Returns the bound of LoRA's A: sqrt(6 / ((1 + a^2) in)) with a = sqrt 5, or 1/sqrt(in)."""
    return 1 / math.sqrt(in_features)


def balanced_init(
    weight: Tensor, shape: LayerShape, rows: Mapping[str, range], generator_for: GeneratorFor
) -> dict[str, Tensor]:
    """Draws both factors within `balanced_bounds`, and sets W := weight - s B A.

    Returns:
        See `lora_init`.
    """
    out_features, in_features, rank, scale = shape
    bound_a, bound_b = balanced_bounds(out_features, in_features, rank)
    all_vectors = range(rank)
    lora_a = random_vectors("lora_a", (rank, in_features), bound_a, generator_for)[all_vectors]
    lora_b = random_counterparts("lora_b", (rank, out_features), bound_b, generator_for)[
        all_vectors
    ]
    return {
        "weight": without_update(weight, rows["weight"], lora_a, lora_b, scale),
        "lora_a": take(lora_a, rows["lora_a"]),
        "lora_b": take(lora_b, rows["lora_b"]),
    }


def balanced_bounds(out_features: int, in_features: int, rank: int) -> tuple[float, float]:
    """Returns the bounds of A and B that balance the gradients of both factors.

    sqrt(3) times the standard deviations of SwitchLoRA's initialization (arXiv 2406.06564):
    std_A = (rank sqrt(out) / in^(3/2))^(1/4) sqrt(gain)
    std_B = (rank / sqrt(out in))^(1/4) sqrt(gain)
    """
    std_a = (rank * math.sqrt(out_features) / in_features**1.5) ** 0.25 * math.sqrt(GAIN)
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * math.sqrt(GAIN)
    return math.sqrt(3) * std_a, math.sqrt(3) * std_b


def without_update(
    weight: Tensor, rows: range, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """Returns `weight` - s B A.

    Multiplies block by block, so that a block's bits do not depend on the number of ranks.

    Args:
        weight: rows `rows` of W [out, in], complete blocks of `initial_draws`.
        lora_a, lora_b: [rank, in] and [rank, out].
    """
    result = torch.empty_like(weight)
    for block in split_blocks((lora_b.shape[1], lora_a.shape[1]), rows):
        own = range(block.start - rows.start, block.stop - rows.start)
        torch.addmm(
            take(weight, own),
            take(lora_b.t(), block),
            lora_a,
            alpha=-scale,
            out=take(result, own),
        )
    return result


def take(tensor: Tensor, rows: range) -> Tensor:
    """Returns a view of consecutive rows."""
    return tensor[rows.start : rows.stop]


def random_vectors(
    name: str, shape: tuple[int, int], bound: float, generator_for: GeneratorFor
) -> RandomRows:
    """Draws A's vectors or candidates, [vectors, in], uniformly from [-bound, bound)."""
    return RandomRows(
        name, shape, lambda block, generator: uniform(block, bound, generator), generator_for
    )


def random_counterparts(
    name: str, shape: tuple[int, int], bound: float, generator_for: GeneratorFor
) -> RandomRows:
    """The same for B's, [vectors, out]. Each block is drawn as columns, [out, vectors]."""
    return RandomRows(
        name,
        shape,
        lambda block, generator: uniform(block[::-1], bound, generator).t(),
        generator_for,
    )


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Draws fp32 values uniformly from [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
