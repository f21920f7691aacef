"""The linear layers that a method targets, and the base class of methods that replace them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from switchtitan.contracts import (
    LanguageModel,
    Method,
    MethodConfig,
    OptimizerConfig,
    Reparametrized,
    TrainedModel,
    TrainingOptimizer,
)
from switchtitan.optim import OPTIMIZERS
from switchtitan.optim.parameters import TrainedParameter, trained_parameters, with_width_factors

FACTORS = ("lora_a", "lora_b")
"""Local names of the factors A [rank, in] and B, stored transposed, [rank, out]."""
SUFFIX_A, SUFFIX_B = (f".{factor}" for factor in FACTORS)


def linear_layers(
    model: TrainedModel, targets: tuple[str, ...] | None = None
) -> dict[str, nn.Linear]:
    """Returns the linear layers that are targets, by default all in the model's blocks, by
    qualified name. Found by type: the default does not depend on a model's names."""
    blocks = tuple(f"{block}." for block in model.blocks())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (f"{name}.".startswith(blocks) if targets is None else is_named(name, targets))
    }


def is_named(layer: str, targets: Iterable[str]) -> bool:
    """Whether a qualified name ends in one of these names, such as `q_proj` or `mlp.0`."""
    return any(f".{layer}".endswith(f".{target}") for target in targets)


class TargetConfig(MethodConfig):
    """The keys of all methods whose rank is below the dimensions of the layers that they target."""

    former_defaults: ClassVar[Mapping[str, object]] = {
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    rank: int = Field(ge=1)
    """Number of vectors in each factor: at least 1, and below the smaller dimension of every
    target."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Local names of the linear layers that the method changes, or longer ends of their qualified
    names, at least one; by default all in the model's blocks. All other parameters train as with
    full_rank."""

    def completed(self, build_model: Callable[[], TrainedModel]) -> "TargetConfig":
        if self.targets is not None:
            return self
        local_names = dict.fromkeys(
            name.rpartition(".")[2] for name in linear_layers(build_model())
        )
        return self.model_copy(update={"targets": tuple(local_names)})

    def check_model(self, model: TrainedModel) -> list[str]:
        problems = []
        names = [name for name, it in model.named_modules() if isinstance(it, nn.Linear)]
        local_names = {name.rpartition(".")[2] for name in names}
        if unknown := [
            target
            for target in self.targets or ()
            if not any(is_named(name, [target]) for name in names)
        ]:
            problems.append(
                f"[method] targets = {list(self.targets or ())}: the model has no linear layer "
                f"called {', '.join(map(repr, unknown))}; it has {', '.join(sorted(local_names))}"
            )
        shapes = {name: list(it.weight.shape) for name, it in self.targeted(model).items()}
        smallest = min(shapes, key=lambda name: min(shapes[name]), default=None)
        if smallest is not None and self.rank >= min(shapes[smallest]):
            problems.append(
                f"[method] rank = {self.rank}: expected less than the smaller dimension of every "
                f"target; {smallest} is {shapes[smallest]}, so use a rank of at most "
                f"{min(shapes[smallest]) - 1}"
            )
        return problems

    def targeted(self, model: TrainedModel) -> dict[str, nn.Linear]:
        """Returns the linear layers of a model that are targets, by qualified name."""
        return linear_layers(model, self.targets)

    def is_target(self, layer: str) -> bool:
        """Whether a linear layer in the model's blocks is a target, by its qualified name."""
        return self.targets is None or is_named(layer, self.targets)


TargetConfigT = TypeVar("TargetConfigT", bound=TargetConfig)


class FactorLinear(Reparametrized):
    """A layer with factors in place of a linear one: its product, initial values and dense weight.

    B is stored transposed, so that the vectors of both factors are rows.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool) -> None:
        super().__init__(in_features, out_features)
        self.rank = rank
        self.lora_a = nn.Parameter(torch.empty(rank, in_features))
        self.lora_b = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"

    @abstractmethod
    def dense_weight(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight [out, in] of a linear layer that computes the same, given full
        parameters by local name. The layer's own may be on the meta device."""


class ReplacingMethod(Method[TargetConfigT]):
    """Targets become a `FactorLinear`, whose parameters but the bias train at `[optimizer] lr`.

    All other parameters that require a gradient train as well.
    """

    @abstractmethod
    def build_layer(self, name: str, linear: nn.Linear) -> FactorLinear:
        """Returns the layer that replaces `linear`, by its qualified name."""

    def prepare_model(self, model: LanguageModel) -> None:
        for name, linear in self.config.targeted(model).items():
            # A model on the meta device stays there: its full layers may not fit in memory.
            with linear.weight.device:
                model.set_submodule(name, self.build_layer(name, linear))

    def trained_parameters(
        self, model: TrainedModel, config: OptimizerConfig
    ) -> list[TrainedParameter]:
        """Returns all trained parameters; those that are not `is_other` belong to the method."""
        targeted = {
            f"{layer}.{name}"
            for layer, module in model.named_modules()
            if isinstance(module, FactorLinear)
            for name, _ in module.named_parameters()
            if name != "bias"
        }
        entries = [
            entry
            if entry.is_other
            else entry._replace(decays=True, input_dim=0 if entry.name.endswith(SUFFIX_B) else 1)
            for entry in trained_parameters(model, targeted)
        ]
        return with_width_factors(entries, model, self.config, config)

    def build_optimizer(
        self, model: TrainedModel, config: OptimizerConfig, compile_step: bool
    ) -> TrainingOptimizer:
        return OPTIMIZERS.build(config, self.trained_parameters(model, config), compile_step)

    def dense_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        replaced, plain = set(layers_with_factors(tensors)), super().dense_weights(tensors)
        dense = {}
        for name, tensor in plain.items():
            layer, _, local_name = name.rpartition(".")
            if layer not in replaced or local_name == "bias":
                dense[name] = tensor
            elif name.endswith(SUFFIX_A):
                with torch.device("meta"):  # its shapes alone
                    linear = nn.Linear(tensor.shape[1], plain[layer + SUFFIX_B].shape[1], False)
                    replaced_by = self.build_layer(layer, linear)
                own = {key: plain[f"{layer}.{key}"] for key, _ in replaced_by.named_parameters()}
                dense[f"{layer}.weight"] = replaced_by.dense_weight(own)
        return dense


def layers_with_factors(names: Iterable[str]) -> list[str]:
    """Returns the qualified names of the layers with factors among these parameters."""
    return [name.removesuffix(SUFFIX_A) for name in names if name.endswith(SUFFIX_A)]
