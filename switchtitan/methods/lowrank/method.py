"""The base class of methods that train low-rank factors and freeze the weights."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from switchtitan.contracts import (
    LanguageModel,
    LowRankUpdate,
    Method,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.methods.lowrank.config import LowRankConfig
from switchtitan.methods.lowrank.contraction import BY_NAME
from switchtitan.methods.lowrank.linear import (
    FACTORS,
    LowRankLinear,
    lora_bounds,
    low_rank_layers,
    replace_linears,
)
from switchtitan.optim import OPTIMIZERS, TrainedParameter, trained_parameters


def parameters_with_factors(model: LanguageModel, layers: Iterable[str]) -> list[TrainedParameter]:
    """Returns all trained parameters; those treated are the factors of `layers`.

    Args:
        layers: names of layers with the factors A [rank, in] and B, stored transposed [rank, out].
    """
    names = [[f"{layer}.{factor}" for factor in FACTORS] for layer in layers]
    treated = {name for pair in names for name in pair}
    transposed = {second for _, second in names}
    trained = trained_parameters(
        model, treated, model.blocks(), model.output_head(), model.compute_dtype
    )
    return [entry._replace(input_dim=0) if entry.name in transposed else entry for entry in trained]


LayerT = TypeVar("LayerT", bound=LowRankLinear)
"""The class of a method's layers."""
LowRankSection = TypeVar("LowRankSection", bound=LowRankConfig)
"""The configuration class of a low-rank method."""


class LowRankMethod(Method[LowRankSection]):
    """Linear layers become `LowRankLinear`: W frozen, A and B trained."""

    def scale_of(self, layer_name: str) -> float:
        """Returns the scale s of a layer, W + s B A, by its qualified name.

        Both the layer and its dense weight use it.
        """
        return self.config.scale

    def bounds(self, out_features: int, in_features: int) -> tuple[float, float]:
        """Returns the bounds of a layer's initial A and B; by default those of LoRA."""
        return lora_bounds(out_features, in_features, self.config.rank)

    def prepare_model(self, model: nn.Module) -> None:
        """Replaces every targeted linear layer."""
        replace_linears(model, self.config.targets, self.build_layer)

    def trained_parameters(self, model: LanguageModel) -> list[TrainedParameter]:
        """Returns the factors and the parameters outside of low-rank layers."""
        return parameters_with_factors(model, low_rank_layers(model))

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        """Builds one optimizer for all trained parameters."""
        return OPTIMIZERS.build(config, self.trained_parameters(model), compile_step, self.seed)

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns W + s B A for layers with factors, and all other weights, in fp32."""
        updates = self.low_rank_updates(tensors)
        dense = {}
        for name, tensor in super().dense_weights(tensors).items():
            layer_name, _, local_name = name.rpartition(".")
            if layer_name in updates and local_name not in ("weight", "bias"):
                continue
            if local_name == "weight" and layer_name in updates:
                update = updates[layer_name]
                lora_a, lora_b = update.lora_a.to(torch.float32), update.lora_b.to(torch.float32)
                tensor = torch.addmm(tensor, lora_b.t(), lora_a, alpha=update.scale)
            dense[name] = tensor
        return dense

    def low_rank_updates(self, tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
        """Returns the factors of every layer that has them."""
        layers = [
            name.removesuffix(".lora_a") for name in tensors if name.endswith(f".{FACTORS[0]}")
        ]
        return {
            layer: LowRankUpdate(
                tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"], self.scale_of(layer)
            )
            for layer in layers
        }

    def build_layer(self, name: str, linear: nn.Linear) -> LowRankLinear:
        """Returns the layer that replaces `linear`, by its qualified name."""
        return self.new_layer(LowRankLinear, name, linear)

    def new_layer(self, layer_class: type[LayerT], name: str, linear: nn.Linear) -> LayerT:
        """Returns a `LowRankLinear` or a subclass with rank, dropout, ... of the configuration."""
        config = self.config
        return layer_class(
            linear.in_features,
            linear.out_features,
            config.rank,
            self.scale_of(name),
            self.bounds(linear.out_features, linear.in_features),
            bias=linear.bias is not None,
            dropout=config.dropout,
            contraction=None if config.contraction == "cheapest" else BY_NAME[config.contraction],
        )
