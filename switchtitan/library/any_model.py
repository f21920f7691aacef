"""What methods ask of a model, answered for any module."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from switchtitan.contracts import LanguageModel, Reparametrized
from switchtitan.errors import ConfigError, abbreviate
from switchtitan.methods.targets import linear_layers

_FSDP1 = "_fsdp_wrapped_module"
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", _FSDP1)
"""Names of what torch.compile, activation checkpointing and FSDP1 wrap."""
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their layers instead of calling them."""


class AnyModel:
    """A `contracts.TrainedModel` of any module, by the names that it has without wrappers."""

    compute_dtype = torch.float32

    def __init__(self, module: nn.Module) -> None:
        self._module, self.is_merged = module, False

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        return [(plain_name(name), module) for name, module in self._module.named_modules()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(plain_name(name), it) for name, it in self._module.named_parameters()]

    def blocks(self) -> dict[str, nn.Module]:
        """Returns the modules of each `nn.ModuleList`, and of each `nn.Sequential` and
        `nn.ModuleDict` of one class."""
        if isinstance(self._module, LanguageModel):
            return self._module.blocks()
        found = dict[str, nn.Module]()
        for name, module in self.named_modules():
            children = dict(module.named_children())
            is_alike = len({*map(type, children.values())}) == 1 < len(children)
            is_container = isinstance(module, nn.Sequential | nn.ModuleDict)
            if isinstance(module, nn.ModuleList) or (is_container and is_alike):
                found |= {f"{name}.{key}".lstrip("."): child for key, child in children.items()}
        return found

    def output_head(self) -> nn.Module | None:
        """Returns the head of models of transformers; None if the module does not name it."""
        if isinstance(self._module, LanguageModel):
            return self._module.output_head()
        head: nn.Module | None = getattr(self._module, "get_output_embeddings", lambda: None)()
        return head

    def replaceable(self, targets: tuple[str, ...] | None) -> dict[str, nn.Linear]:
        """Returns the targets by name, by default the layers in blocks whose weight no other module
        uses. Raises a ConfigError if there is none, or another one is among `targets`."""
        parameters = self._module.named_parameters(remove_duplicate=False)
        uses: Counter[Tensor] = Counter(parameter for _, parameter in parameters)
        readers = [it for it in self._module.modules() if isinstance(it, _READERS)]
        read = {child for reader in readers for child in reader.modules()}
        able = {
            name: linear
            for name, linear in self.named_modules()
            if isinstance(linear, nn.Linear)
            and type(linear).forward is nn.Linear.forward
            and linear not in read
            and uses[linear.weight] == 1
        }
        found = linear_layers(self, targets)
        if kept := [name for name in found if name not in able and targets is not None]:
            raise ConfigError(
                f"[method] targets: {abbreviate(kept)}: expected layers with nn.Linear's forward "
                "whose weight no other module uses, as with tied heads and nn.MultiheadAttention"
            )
        linears = {name: able[name] for name in found if name in able}
        if not linears:
            raise ConfigError(
                "[method] targets: missing, and the modules of nn.ModuleLists have no nn.Linear "
                "that can be replaced (Conv1D, tied heads, nn.MultiheadAttention and "
                f"nn.TransformerEncoderLayer cannot); the model has {abbreviate(able) or 'none'}"
            )
        dtypes = {linear.weight.dtype for linear in linears.values()}
        if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16}:
            names = ", ".join(sorted(map(str, dtypes)))
            raise ConfigError(f"weights of layers are {names}: expected float32, or all bfloat16")
        return linears


def plain_name(name: str) -> str:
    """Returns a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_plain(model: nn.Module) -> None:
    """Raises a ConfigError if a model is wrapped, sharded or not plain any more."""
    if any(isinstance(module, Reparametrized) for module in model.modules()):
        raise ConfigError("apply: a method is applied to the model already; merge it first")
    is_wrapped = isinstance(model, DistributedDataParallel)
    is_wrapped |= any(plain_name(name) != name for name, _ in model.named_modules())
    if is_wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError("apply: the model is wrapped, compiled or sharded already; apply first")


def check_sharding(model: nn.Module) -> None:
    """Raises a ConfigError if parameters are sharded in another way than FSDP2 does by default."""
    for name, parameter in model.named_parameters():
        placed = parameter.placements if isinstance(parameter, DTensor) else ()
        if (
            _FSDP1 in name
            or len(placed) > 2
            or any(not (it.is_shard(0) if it is placed[-1] else it.is_replicate()) for it in placed)
        ):
            raise ConfigError(f"optimizer: {name}: only fully_shard over dimension 0 is supported")
