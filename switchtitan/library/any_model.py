"""What methods ask of a model, answered for any module."""

from collections import Counter

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from switchtitan.contracts import Reparametrized
from switchtitan.errors import ConfigError, abbreviate
from switchtitan.methods.targets import linear_layers

_FSDP1 = "_fsdp_wrapped_module"
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", _FSDP1)
"""Names of what torch.compile, activation checkpointing and FSDP1 wrap."""
_FP32, _BF16 = torch.float32, torch.bfloat16
_READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that read the weights of their layers instead of calling them."""


class AnyModel:
    """A `contracts.TrainedModel` of any module, by the names that it has without wrappers."""

    compute_dtype = torch.float32

    def __init__(self, module: nn.Module) -> None:
        self._module, self.is_merged = module, False
        # Wrappers may make the modules of a container unlike later.
        self._blocks = {
            f"{name}.{key}".lstrip("."): child
            for name, container in module.named_modules()
            if _holds_blocks(container)
            for key, child in container.named_children()
        }

    def blocks(self) -> dict[str, nn.Module]:
        return self._blocks

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        return [(plain_name(name), module) for name, module in self._module.named_modules()]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(plain_name(name), value) for name, value in self._module.named_parameters()]

    def output_head(self) -> nn.Module | None:
        """Returns the head of models of transformers; None if the module does not name it."""
        head: nn.Module | None = getattr(self._module, "get_output_embeddings", lambda: None)()
        return head

    def hidden_size(self) -> int | None:
        """Returns the width of the head's inputs; None without a linear head."""
        head = self.output_head()
        return head.in_features if isinstance(head, nn.Linear) else None

    def replaceable(self, targets: tuple[str, ...] | None) -> dict[str, nn.Linear]:
        """Returns the targets by name, by default the layers in blocks that train and whose weight
        no other module uses. Raises a ConfigError if there is none, or one cannot be replaced."""
        parameters = self._module.named_parameters(remove_duplicate=False)
        uses: Counter[Tensor] = Counter(parameter for _, parameter in parameters)
        readers = [module for module in self._module.modules() if isinstance(module, _READ_WEIGHTS)]
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
        if targets is None:
            found = {name: able[name] for name in found if name in able}
            found = {name: it for name, it in found.items() if it.weight.requires_grad}
        if unable := [name for name in found if name not in able]:
            raise ConfigError(
                f"[method] targets: {abbreviate(unable)}: expected layers with nn.Linear's forward "
                "whose weight no other module uses, as with tied heads and nn.MultiheadAttention"
            )
        if not found:
            raise ConfigError(
                "[method] targets: missing, and the modules of nn.ModuleLists have no nn.Linear "
                "that trains and can be replaced (Conv1D, tied heads, nn.MultiheadAttention and "
                f"nn.TransformerEncoderLayer cannot); the model has {abbreviate(able) or 'none'}"
            )
        if {linear.weight.dtype for linear in found.values()} not in ({_FP32}, {_BF16}):
            dtypes = ", ".join({str(linear.weight.dtype) for linear in found.values()})
            raise ConfigError(f"weights of layers are {dtypes}: expected float32, or all bfloat16")
        return found


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is an `nn.ModuleList`, or an `nn.Sequential` or `nn.ModuleDict` of several
    modules of one class."""
    types = [type(child) for child in module.children()]
    is_alike = len(types) > 1 and len(set(types)) == 1
    is_container = isinstance(module, nn.Sequential | nn.ModuleDict)
    return isinstance(module, nn.ModuleList) or (is_container and is_alike)


def plain_name(name: str) -> str:
    """Returns a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_plain(model: nn.Module) -> None:
    """Raises a ConfigError if a model is wrapped, sharded, or has a method's layers."""
    if any(isinstance(module, Reparametrized) for module in model.modules()):
        raise ConfigError("apply: a method is applied to the model already; merge it first")
    is_wrapped = isinstance(model, DistributedDataParallel)
    is_wrapped |= any(plain_name(name) != name for name, _ in model.named_modules())
    if is_wrapped or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigError("apply: the model is wrapped, compiled or sharded already; apply first")


def check_sharding(model: nn.Module) -> None:
    """Raises a ConfigError if parameters are sharded in another way than FSDP2 does by default."""
    expected = [(Shard(0),), (Replicate(), Shard(0))]
    for name, value in model.named_parameters():
        if _FSDP1 in name or (isinstance(value, DTensor) and value.placements not in expected):
            raise ConfigError(f"optimizer: {name}: only fully_shard over dimension 0 is supported")
