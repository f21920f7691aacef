"""The low-rank layer: a frozen dense weight plus the product of two trained factors."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class InitialFactors(Protocol):
    """A function that computes a low-rank layer's initial tensors."""

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        generator_for: Callable[[str], torch.Generator],
    ) -> dict[str, Tensor]:
        """Returns all of a layer's tensors by local name, with W + s B A = `weight` [out, in]."""
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

    def initial_tensors(
        self, weight: Tensor, generator_for: Callable[[str], torch.Generator]
    ) -> dict[str, Tensor]:
        """See `contracts.Reparametrized`."""
        return self._initial_factors(weight, self.rank, self.scale, generator_for)

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
    model: nn.Module, targets: Iterable[str], build: Callable[[str, nn.Linear], LowRankLinear]
) -> dict[str, LowRankLinear]:
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
    replaced: dict[str, LowRankLinear] = {}
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
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Draws A uniformly within 1/sqrt(in), and sets B to zero. W is unchanged.

    (LoRA, arXiv 2106.09685, with Kaiming-uniform A, a = sqrt 5.)

    Args:
        weight: [out, in], the linear layer's initial weight.

    Returns:
        `weight` [out, in], `lora_a` [rank, in], `lora_b` [rank, out].
    """
    out_features, in_features = weight.shape
    lora_a = uniform((rank, in_features), lora_bound(in_features), generator_for("lora_a"))
    return {"weight": weight, "lora_a": lora_a, "lora_b": torch.zeros(rank, out_features)}


def lora_bound(in_features: int) -> float:
    """Returns the bound of LoRA's A: sqrt(6 / ((1 + a^2) in)) with a = sqrt 5, or 1/sqrt(in)."""
    return 1 / math.sqrt(in_features)


def balanced_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Draws both factors within `balanced_bounds`, and sets W := weight - s B A.

    Returns:
        See `lora_init`.
    """
    out_features, in_features = weight.shape
    bound_a, bound_b = balanced_bounds(out_features, in_features, rank)
    lora_a = uniform((rank, in_features), bound_a, generator_for("lora_a"))
    lora_b = uniform((out_features, rank), bound_b, generator_for("lora_b")).t()
    return {
        "weight": without_update(weight, lora_a, lora_b, scale),
        "lora_a": lora_a,
        "lora_b": lora_b,
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


def without_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Returns `weight` - s B A, with `lora_a` [rank, in] and `lora_b` [rank, out]."""
    return torch.addmm(weight, lora_b.t(), lora_a, alpha=-scale)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Draws fp32 values uniformly from [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
