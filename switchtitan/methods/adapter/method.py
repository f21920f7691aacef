"""The base classes of methods whose layers have factors, and of their sections."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import (
    LanguageModel,
    LowRankUpdate,
    Method,
    MethodConfig,
    OptimizerConfig,
    TrainingOptimizer,
)
from switchtitan.methods.adapter.contraction import BY_NAME
from switchtitan.methods.adapter.linear import FACTORS, AdapterLinear, FactorLinear, lora_bounds
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import TrainedParameter, trained_parameters

ADAPTED_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class FactorConfig(MethodConfig):
    """The keys of all methods whose rank is below the dimensions of the layers that they adapt."""

    rank: int = Field(ge=1)
    """Number of vectors in each factor: at least 1, and below the smaller dimension of every
    adapted layer."""
    targets: tuple[str, ...] = Field(default=ADAPTED_LINEARS, min_length=1)
    """Local names of the linear layers to adapt, at least one; by default all of attention and MLP.
    All other parameters train as with full_rank."""

    def adapts(self, name: str) -> bool:
        """Returns whether the linear layer of this qualified name is a target."""
        return name.rpartition(".")[2] in self.targets

    def check_model(self, linear_shapes: dict[str, tuple[int, int]]) -> list[str]:
        """See `contracts.MethodConfig`."""
        problems = []
        local_names = {name.rpartition(".")[2] for name in linear_shapes}
        if unknown := [target for target in self.targets if target not in local_names]:
            problems.append(
                f"[method] targets = {list(self.targets)}: the model has no linear layer called "
                f"{', '.join(map(repr, unknown))}; it has {', '.join(sorted(local_names))}"
            )
        adapted = filter(self.adapts, linear_shapes)
        smallest = min(adapted, key=lambda name: min(linear_shapes[name]), default=None)
        if smallest is not None and self.rank >= min(linear_shapes[smallest]):
            problems.append(
                f"[method] rank = {self.rank}: expected less than the smaller dimension of every "
                f"adapted layer; {smallest} is {list(linear_shapes[smallest])}, so use a rank of "
                f"at most {min(linear_shapes[smallest]) - 1}"
            )
        return problems


class AdapterConfig(FactorConfig):
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

    def without_effect(self) -> list[str]:
        """See `registry.Section`."""
        if not self.dropout or self.contraction == "cheapest":
            return []
        return [
            f"contraction = {self.contraction!r} has no effect on training with dropout = "
            f"{self.dropout:g}, which is always factored"
        ]


LayerT = TypeVar("LayerT", bound=AdapterLinear)
FactorConfigT = TypeVar("FactorConfigT", bound=FactorConfig)
AdapterConfigT = TypeVar("AdapterConfigT", bound=AdapterConfig)
SUFFIX_A, SUFFIX_B = (f".{factor}" for factor in FACTORS)


class ReplacingMethod(Method[FactorConfigT]):
    """Targeted linear layers become a `FactorLinear`, whose parameters train at `[optimizer] lr`.

    All other parameters that require a gradient train as well.
    """

    adapted: ClassVar[tuple[str, ...]] = FACTORS
    """Local names of the trained parameters of replaced layers, except for the bias."""

    @abstractmethod
    def build_layer(self, name: str, linear: nn.Linear) -> FactorLinear:
        """Returns the layer that replaces `linear`, by its qualified name."""

    @abstractmethod
    def dense_weight(self, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight [out, in] of a replaced layer, from fp32 tensors by qualified name."""

    def prepare_model(self, model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and self.config.adapts(name):
                # A model on the meta device stays there: its full layers may not fit in memory.
                with module.weight.device:
                    model.set_submodule(name, self.build_layer(name, module))

    def trained_parameters(self, model: LanguageModel) -> list[TrainedParameter]:
        """Returns all trained parameters; those that are not `is_other` belong to the method."""
        adapted = {
            name for name, _ in model.named_parameters() if name.rpartition(".")[2] in self.adapted
        }
        return [
            entry
            if entry.is_other
            else entry._replace(decays=True, input_dim=0 if entry.name.endswith(SUFFIX_B) else 1)
            for entry in trained_parameters(model, adapted)
        ]

    def build_optimizer(
        self, model: LanguageModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        return OPTIMIZERS.build(config, self.trained_parameters(model), compile_step)

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        replaced, plain = set(layers_with_factors(tensors)), super().dense_weights(tensors)
        dense = {}
        for name, tensor in plain.items():
            layer, _, local_name = name.rpartition(".")
            if layer not in replaced or local_name == "bias":
                dense[name] = tensor
            elif name.endswith(SUFFIX_A):
                dense[f"{layer}.weight"] = self.dense_weight(layer, plain)
        return dense


class AdapterMethod(ReplacingMethod[AdapterConfigT]):
    """Linear layers become `AdapterLinear`: W frozen, A and B trained."""

    def scale_of(self, layer_name: str) -> float:
        """Returns the scale s of a layer, W + s B A, by its qualified name."""
        return self.config.alpha / self.config.rank

    def bounds(self, out_features: int, in_features: int) -> tuple[float, float]:
        """Returns the bounds of a layer's initial A and B; by default those of LoRA."""
        return lora_bounds(out_features, in_features, self.config.rank)

    def build_layer(self, name: str, linear: nn.Linear) -> AdapterLinear:
        return self.new_layer(AdapterLinear, name, linear)

    def new_layer(self, layer_class: type[LayerT], name: str, linear: nn.Linear) -> LayerT:
        """Returns a `AdapterLinear` or a subclass with rank, dropout, ... of the configuration."""
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

    def dense_weight(self, layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
        lora_a, lora_b = (tensors[f"{layer}.{factor}"] for factor in FACTORS)
        weight = tensors[f"{layer}.weight"]
        return torch.addmm(weight, lora_b.t(), lora_a, alpha=self.scale_of(layer))

    def low_rank_updates(self, tensors: Mapping[str, Tensor]) -> dict[str, LowRankUpdate]:
        return {
            layer: LowRankUpdate(
                tensors[layer + SUFFIX_A], tensors[layer + SUFFIX_B], self.scale_of(layer)
            )
            for layer in layers_with_factors(tensors)
        }


def layers_with_factors(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(SUFFIX_A) for name in names if name.endswith(SUFFIX_A)]
