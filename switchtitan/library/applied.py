"""A method that is applied to a model: its layers, its optimizer, and the way back."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from switchtitan.contracts import OptimizerConfig, TrainingOptimizer
from switchtitan.distributed.fsdp import InitialValues, shard_buffers
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.shards import full_tensor, gather_on_main
from switchtitan.errors import ConfigError
from switchtitan.library.any_model import AnyModel, check_plain, check_sharding, plain_name
from switchtitan.library.optimizer import Optimizer
from switchtitan.methods import METHODS, optimizer_problems
from switchtitan.methods.targets import FACTORS, FactorLinear, ReplacingMethod, TargetConfig
from switchtitan.optim import OPTIMIZERS

logger = logging.getLogger(__name__)


class AppliedMethod:
    """What `switchtitan.apply` returns.

    Attributes:
        model: the given one.
        layers: those in place of linear ones, by name; none if the method replaces none.
    """

    def __init__(
        self, model: nn.Module, name: str, num_steps: int, seed: int, keys: Mapping[str, Any]
    ) -> None:
        check_plain(model)
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ConfigError(f"num_steps = {num_steps!r}: expected an integer of at least 1")
        self.model, self.layers, self._seed = model, dict[str, FactorLinear](), seed
        self._view, config = AnyModel(model), METHODS.restore({"name": name, **keys})
        problems = [*config.check_model(self._view), *config.check_length(num_steps)]
        if not config.keeps_initial_weights:
            problems.append(f"[method] name = {name!r}: changes what a given model computes")
        if problems:
            raise ConfigError("; ".join(problems))
        method = self._method = METHODS.build(config, num_steps, seed)
        targets = dict[str, nn.Linear]()
        if isinstance(config, TargetConfig):
            targets = self._view.replaceable(config.targets)
        if isinstance(method, ReplacingMethod):
            self.layers = {layer: self._replace(method, layer, targets[layer]) for layer in targets}
        self._on_meta = [name for name in self.layers if targets[name].weight.is_meta]
        self._has_optimizer = False

    def initialize(self) -> None:
        """Starts layers that were on the meta device in `apply`, once the model has plain weights.
        Collective if they are sharded."""
        while self._on_meta:
            layer = self.layers[name := self._on_meta.pop()]
            self._start(name, layer, full_tensor(layer.get_parameter("weight")))

    def optimizer(self, name: str = "adamw", *, lr: float, **keys: Any) -> Optimizer:
        """Returns an optimizer of all parameters that require a gradient. Call after `fully_shard`.

        Args:
            name, lr, keys: those of the section `[optimizer]`, e.g. `betas`. `lr` is that of the
                first step if no scheduler changes it.

        Raises:
            ConfigError: names the key, its value and what was expected.
        """
        if not isinstance(name, str):
            raise ConfigError("optimizer: expected a name; it finds the parameters by itself")
        config = OPTIMIZERS.restore({"name": name, "lr": lr, **keys})
        problems = optimizer_problems(self._method.config, config, self._view)
        if config.orthogonalizes and not (self.layers or self._view.blocks()):
            problems.append(
                f"[optimizer] name = {name!r}: trains blocks; there is no nn.ModuleList"
            )
        if self._view.is_merged:
            problems.append("optimizer: the method was merged; apply it again")
        if self._on_meta:
            problems.append("optimizer: call initialize() before, once plain weights are loaded")
        if problems:
            raise ConfigError("; ".join(problems))
        self._has_optimizer = True
        return Optimizer(self._view, lambda: self._build(config))

    def dense_state_dict(self) -> dict[str, Tensor]:
        """Returns the state dict of the plain model that computes the same.

        Of a sharded model on the CPU of rank 0, and empty on others; collective.
        """
        state, weights = self._full_state(), {f"{name}.weight" for name in self.layers}
        with full_precision():
            dense = self._method.dense_weights(state)
        return {
            name: tensor.to(state[name].dtype) if name in weights else state[name]
            for name, tensor in dense.items()
        }

    def base_state_dict(self) -> dict[str, Tensor]:
        """Returns `dense_state_dict` without the low-rank updates, which `save_peft` writes."""
        factors = {f"{name}.{key}" for name in self.layers for key in FACTORS}
        return {name: it for name, it in self._full_state().items() if name not in factors}

    def save_peft(self, folder: str | Path, base: str | Path, task_type: str | None = None) -> None:
        """Writes the low-rank updates as an adapter that PEFT loads; collective if sharded.

        Args:
            base: a folder with `base_state_dict`, for PEFT.
            task_type: PEFT's name of the model's class, e.g. "CAUSAL_LM", for its auto classes.
        """
        from switchtitan.hub.peft_folder import write_adapter

        if not self.layers:
            raise ConfigError("save_peft: the model has no low-rank updates")
        updates = self._method.low_rank_updates(self._full_state())
        if _is_main():
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_adapter(updates.items(), Path(folder), Path(base), torch.float32, task_type)

    def merge(self) -> nn.Module:
        """Puts `nn.Linear` layers with the trained weights in place; returns the model."""
        if any(isinstance(layer.lora_a, DTensor) for layer in self.layers.values()):
            raise ConfigError("merge: the model is sharded; use dense_state_dict")
        if not self._has_optimizer:
            logger.warning("merge: method.optimizer was not called, so the method did not train")
        dense = self.dense_state_dict()
        for name, layer in list(self.model.named_modules()):
            if isinstance(layer, FactorLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, False, "meta")
                linear.weight = nn.Parameter(dense[f"{plain_name(name)}.weight"].detach())
                linear.register_parameter("bias", layer.bias)
                self.model.set_submodule(name, linear.train(layer.training))
        self.layers, self._view.is_merged = {}, True
        return self.model

    def _replace(self, method: ReplacingMethod, name: str, linear: nn.Linear) -> FactorLinear:
        with torch.device("meta"):
            layer = method.build_layer(name, linear).to(torch.float32).train(linear.training)
        if layer.host_buffers:
            raise ConfigError("[method]: only `switchtitan train` keeps candidates in host memory")
        for key in ("weight", "bias"):  # stay the given tensors
            setattr(layer, key, None)
        layer.to_empty(device=linear.weight.device)
        layer.weight, layer.bias = linear.weight.requires_grad_(False), linear.bias
        self.model.set_submodule(name, layer)
        if not linear.weight.is_meta:
            self._start(name, layer, linear.weight)
        return layer

    @full_precision()
    def _start(self, name: str, layer: FactorLinear, weight: Tensor) -> None:
        """Makes a layer compute what `weight` [out, in] does."""
        plain = weight.detach().to("cpu", torch.float32)
        own = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        own.pop("bias", None)

        def read(_: str, rows: range) -> Tensor:
            return plain[rows.start : rows.stop]

        InitialValues(self.model, self._seed, read).fill(name, own)

    def _build(self, config: OptimizerConfig) -> TrainingOptimizer:
        check_sharding(self.model)
        for name, layer in self.layers.items():
            layer.get_parameter("weight").requires_grad_(False)
            factor: Tensor = layer.lora_a
            if factor.dtype != torch.float32 or not factor.requires_grad:
                problem = f"{name}: its factors are frozen, or {factor.dtype}"
                raise ConfigError(f"{problem}: freeze layers and cast the model before apply")
            if isinstance(factor, DTensor):  # fully_shard leaves buffers as they are
                shard_buffers(layer, factor.device_mesh)
        for name, p in self._view.named_parameters():
            if config.trains_bf16 and p.requires_grad and p.dtype != torch.float32:
                raise ConfigError(f"{name} is {p.dtype}: {config.name} trains torch.float32 alone")
        return self._method.build_optimizer(self._view, config, compile_step=False)

    def _full_state(self) -> dict[str, Tensor]:
        """Returns full tensors by plain name, without candidates."""
        state = {plain_name(name): tensor for name, tensor in self.model.state_dict().items()}
        for name, layer in self.layers.items():
            for key in layer.sharded_buffers:
                del state[f"{name}.{key}"]
        if any(isinstance(tensor, DTensor) for tensor in state.values()):
            return gather_on_main(state.items(), _is_main())
        return state


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
