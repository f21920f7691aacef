"""The base classes of methods that train adapters, and of their sections."""

from collections.abc import Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import LowRankUpdate
from switchtitan.methods.adapter.contraction import BY_NAME
from switchtitan.methods.adapter.linear import AdapterLinear, balanced_bounds, lora_bounds
from switchtitan.methods.targets import (
    SUFFIX_A,
    SUFFIX_B,
    ReplacingMethod,
    TargetConfig,
    layers_with_factors,
)
from switchtitan.numerics.fixed_point import values_of


class AdapterConfig(TargetConfig):
    """The keys of methods with factors and a frozen weight."""

    freezes_weights: ClassVar[bool] = True
    resumable_keys: ClassVar[frozenset[str]] = frozenset({"contraction"})
    alpha: float = Field(default=1.0, gt=0)
    """The low-rank update is scaled by alpha / rank; above 0."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability, in [0, 1), for the input of the low-rank update."""
    contraction: Literal["cheapest", "factored", "merged", "dense_gradient"] = "cheapest"
    """How a layer is computed; all agree to rounding. For each layer's shape, rank and number of
    tokens, `cheapest` chooses the one with the fewest operations on a CPU, and on a GPU the one
    that takes the least time by peak FLOP/s and memory bandwidth: of an A100 on GPUs of compute
    capability 8.0 to 8.8, of an H100 on all others. With dropout, training is always factored."""

    @property
    def is_balanced(self) -> bool:
        """Whether A and B start with gradients of similar size; otherwise B starts at zero."""
        return False

    def width_exponent(self, of_matrices: float) -> float | None:
        return of_matrices - 0.5 if self.is_balanced else None

    def without_effect(self) -> list[str]:
        if not self.dropout or self.contraction == "cheapest":
            return []
        return [
            f"contraction = {self.contraction!r} has no effect on training with dropout = "
            f"{self.dropout:g}, which is always factored"
        ]


AdapterConfigT = TypeVar("AdapterConfigT", bound=AdapterConfig)


class AdapterMethod(ReplacingMethod[AdapterConfigT]):
    """Linear layers become an `AdapterLinear`: W frozen, A and B trained."""

    layer_type: ClassVar[type[AdapterLinear]] = AdapterLinear

    def scale_of(self, layer_name: str) -> float:
        """Returns the scale s of a layer, W + s B A, by its qualified name."""
        return self.config.alpha / self.config.rank

    def build_layer(self, name: str, linear: nn.Linear) -> AdapterLinear:
        config = self.config
        bounds = balanced_bounds if config.is_balanced else lora_bounds
        return self.layer_type(
            linear.in_features,
            linear.out_features,
            config.rank,
            self.scale_of(name),
            bounds(linear.out_features, linear.in_features, config.rank),
            bias=linear.bias is not None,
            dropout=config.dropout,
            contraction=None if config.contraction == "cheapest" else BY_NAME[config.contraction],
        )

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().dense_weights({n: values_of(t, torch.float32) for n, t in tensors.items()})

    def low_rank_updates(self, tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
        return {
            layer: LowRankUpdate(
                tensors[layer + SUFFIX_A], tensors[layer + SUFFIX_B], self.scale_of(layer)
            )
            for layer in layers_with_factors(tensors)
        }
