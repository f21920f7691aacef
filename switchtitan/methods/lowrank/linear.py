"""The low-rank layer: a frozen dense weight plus the trained product of two thin factors."""

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
"""The gain of a leaky ReLU with slope sqrt(5), as in Kaiming-uniform initialization of linear layers."""


class InitialFactors(Protocol):
    """How a low-rank layer starts."""

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        generator_for: Callable[[str], torch.Generator],
    ) -> dict[str, Tensor]:
        """All of a layer's tensors by local name, such that the layer computes what the plain `weight` [out, in] does."""
        ...


class LayerBuffer(NamedTuple):
    """A tensor that belongs to a layer in addition to its parameters, split over ranks along dimension 0, as they are."""

    shape: tuple[int, int]
    dtype: torch.dtype | None = None
    """By default that of the parameters."""
    is_on_host: bool = False
    """Whether it stays in host memory."""


class LowRankLinear(nn.Module):
    """y = x (W + s B A)^T (+ bias), with W frozen, in the dtype of x and of the factors; W may be of another.

    Args:
        in_features, out_features: of the plain layer that it stands in for.
        rank: number of vectors in each factor.
        scale: s.
        initial_factors: see `InitialFactors`.
        dropout: probability that an element of x is zeroed on its way into A.
        buffers: further tensors that belong to the layer, by local name.
        contraction: how to compute it where nothing is dropped; by default the cheapest for x.

    Shapes: `weight` [out, in], `lora_a` [rank, in], `lora_b` [rank, out]: B is stored transposed, so that each vector of
    either factor is a row.
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
        return f"in={self.in_features}, out={self.out_features}, rank={self.rank}, scale={self.scale:g}"


def low_rank_layer_for(
    linear: nn.Linear,
    config: LowRankConfig,
    scale: float,
    initial_factors: InitialFactors,
    buffers: dict[str, LayerBuffer] | None = None,
) -> LowRankLinear:
    """The low-rank layer that stands in for `linear`, with rank, dropout and contraction from `config`."""
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
    """Replaces every `nn.Linear` whose local name is among `targets` by `build(name, linear)`, on the same device.

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
            # A model on the meta device must stay there: whole layers may not fit this rank's memory.
            with linear.weight.device:
                replaced[name] = build(name, linear)
            setattr(model.get_submodule(parent_name), local_name, replaced[name])
    return replaced


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    """The low-rank layers of a model by qualified name, in the model's order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)
    }


def lora_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """A uniform on +-1/sqrt(in), B zero, W untouched (LoRA, arXiv 2106.09685, with Kaiming-uniform A, a = sqrt 5).

    Args:
        weight: [out, in], the plain layer's initial weight.

    Returns:
        `weight` [out, in], `lora_a` [rank, in], `lora_b` [rank, out].
    """
    out_features, in_features = weight.shape
    lora_a = uniform((rank, in_features), lora_bound(in_features), generator_for("lora_a"))
    return {"weight": weight, "lora_a": lora_a, "lora_b": torch.zeros(rank, out_features)}


def lora_bound(in_features: int) -> float:
    """Bound of the uniform distribution of LoRA's A: sqrt(6 / ((1 + a^2) in)) with a = sqrt 5, which is 1/sqrt(in)."""
    return 1 / math.sqrt(in_features)


def balanced_init(
    weight: Tensor, rank: int, scale: float, generator_for: Callable[[str], torch.Generator]
) -> dict[str, Tensor]:
    """Both factors random with `balanced_bounds`, and W := weight - s B A, so that the layer computes what `weight` does.

    Returns:
        As `lora_init`.
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
    """Bounds of the uniform distributions for A and B that give both factors gradients of like size (SwitchLoRA, arXiv
    2406.06564, initialization): sqrt(3) times

    std_A = (rank sqrt(out) / in^(3/2))^(1/4) sqrt(gain), std_B = (rank / sqrt(out in))^(1/4) sqrt(gain).
    """
    std_a = (rank * math.sqrt(out_features) / in_features**1.5) ** 0.25 * math.sqrt(GAIN)
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * math.sqrt(GAIN)
    return math.sqrt(3) * std_a, math.sqrt(3) * std_b


def without_update(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W such that W + s B A is `weight` [out, in], with `lora_a` [rank, in] and `lora_b` [rank, out]."""
    return torch.addmm(weight, lora_b.t(), lora_a, alpha=-scale)


def uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """fp32 values drawn uniformly from [-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
