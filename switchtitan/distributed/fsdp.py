"""FSDP2 and HSDP over a model's blocks, mixed precision, and the materialization of a sharded model."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from switchtitan.contracts import LanguageModel, Reparametrized
from switchtitan.distributed.seeds import generator_for
from switchtitan.distributed.shards import copy_from_full_, empty_on_host_like, local, shard_buffer


def shard_model(
    model: LanguageModel,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    frozen_weights: Literal["shard", "replicate"] = "shard",
) -> None:
    """Splits every parameter, and the buffers that modules declare, over the ranks of `mesh` along dimension 0.

    Masters keep their type; weights are gathered in `compute_dtype`, gradients are reduced in fp32. One block is one unit of
    communication; embedding, last norm and head form another. Call on the meta device, after compilation.

    Args:
        frozen_weights: "replicate" leaves parameters that do not train whole, plain tensors on every rank, in their own type:
            who uses or changes them must see to that every rank does the same.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # Rotary tables come in fp32 and stay so.
        cast_forward_inputs=False,
    )
    whole = (
        {parameter for parameter in model.parameters() if not parameter.requires_grad}
        if frozen_weights == "replicate"
        else None
    )
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for block in model.blocks().values():
        shard(block, reshard_after_forward=reshard_after_forward)
    # The root's weights are needed again at once by its backward pass.
    shard(model, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, Reparametrized):
            for name in module.sharded_buffers():
                setattr(module, name, shard_buffer(getattr(module, name), mesh))


def cast_frozen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes parameters that do not train be of `dtype`; call on the meta device, before sharding."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                setattr(
                    module,
                    name,
                    nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False),
                )


def materialize(
    model: LanguageModel,
    device: torch.device,
    seed: int,
    initial_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Allocates a meta model's shards on `device` and fills them with its initial values.

    Each value is drawn whole from (seed, parameter name) and cut, so it does not depend on the number of ranks. It is in fp32,
    and is rounded to nearest for a parameter of another type.

    Args:
        initial_weights: values of the plain model's parameters, instead of drawn ones: a warm start.
    """
    _allocate(model, device)

    def plain_value(name: str, shape: torch.Size) -> Tensor:
        if initial_weights is not None:
            return initial_weights[name].to(torch.float32)
        return model.initial_value(name, shape, generator_for(seed, name))

    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        own = dict(module.named_parameters(recurse=False)) | dict(
            module.named_buffers(recurse=False)
        )
        plain = [
            name
            for name in own
            if not isinstance(module, Reparametrized) or name in ("weight", "bias")
        ]
        values = {name: plain_value(prefix + name, own[name].shape) for name in plain}
        if isinstance(module, Reparametrized):
            values |= module.initial_tensors(
                values["weight"], partial(_generator_for_local, seed, prefix)
            )
        for name, tensor in own.items():
            copy_from_full_(tensor, values[name])


def host_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that modules declare to stay in host memory, by qualified name."""
    return {
        f"{module_name}.{name}" if module_name else name: getattr(module, name)
        for module_name, module in model.named_modules()
        if isinstance(module, Reparametrized)
        for name in module.host_buffers()
    }


def num_device_bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Bytes of this rank's parts of `tensors` that lie in the memory of `device`; of a CPU, that is the host's."""
    return sum(part.nbytes for part in map(local, tensors) if part.device.type == device.type)


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Gives a meta model memory on `device`, but for buffers that stay in host memory."""
    on_host = host_buffers(model)
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in on_host}
    whole = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    for name, owner in owners.items():
        # Else the device would have to hold it for a moment.
        setattr(owner, name.rpartition(".")[2], None)
    for module, name, _ in whole:
        # `to_empty` exchanges tensors, which plain ones without values may refuse.
        setattr(module, name, None)
    model.to_empty(device=device)
    for module, name, parameter in whole:
        setattr(
            module,
            name,
            nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False),
        )
    for name, owner in owners.items():
        setattr(owner, name.rpartition(".")[2], empty_on_host_like(on_host[name]))


def _generator_for_local(seed: int, prefix: str, local_name: str) -> torch.Generator:
    return generator_for(seed, prefix + local_name)


def accumulate_gradients(model: nn.Module, is_last_micro_batch: bool) -> None:
    """Says whether the coming backward pass ends a step: gradients are reduced over the ranks once per step, then."""
    assert isinstance(model, FSDPModule)
    model.set_is_last_backward(is_last_micro_batch)
    model.set_requires_gradient_sync(is_last_micro_batch)


def free_gathered_weights(model: nn.Module) -> None:
    """Goes back to shards alone, after forward passes that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
