"""FSDP2 and HSDP over a model's blocks, mixed precision, and materialization of a sharded model."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from switchtitan.contracts import LanguageModel, Reparametrized
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.initial import ReadRows, covering_blocks, plain_value
from switchtitan.distributed.precision import full_precision
from switchtitan.distributed.replicas import compute_in_turns
from switchtitan.distributed.shards import (
    all_ranks_group,
    copy_from_full_,
    local,
    row_range,
    shard_buffer,
    with_local,
)
from switchtitan.numerics.fixed_point import FIXED, pack
from switchtitan.numerics.random import generator_for
from switchtitan.progress import progress_bar


def shard_model(
    model: LanguageModel, mesh: DeviceMesh, compute_dtype: torch.dtype, config: ParallelismConfig
) -> None:
    """Shards every parameter, and the buffers that modules declare, over `mesh` along dimension 0.

    Master weights keep their dtype. Weights are gathered in `compute_dtype`; gradients are reduced
    in fp32. Call on the meta device, after compilation. With `frozen_weights = "replicate"`, frozen
    parameters are full plain tensors, to which every rank must apply the same updates.
    """
    model.compute_dtype = compute_dtype
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # Rotary tables stay in fp32.
        cast_forward_inputs=False,
    )
    apart = None
    if config.frozen_weights == "replicate":
        apart = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, ignored_params=apart)
    for modules, is_freed_after_forward in _units(model, config):
        # A list of one module is a group too, whose hooks take more time.
        unit = modules if len(modules) > 1 else modules[0]
        shard(unit, reshard_after_forward=is_freed_after_forward)
        if isinstance(modules[0], nn.Embedding):
            assert isinstance(modules[0], FSDPModule)
            # The gradient of an embedding does not depend on its weight.
            modules[0].set_unshard_in_backward(False)
    # The root holds what is outside the units: modules that any pass may use, in any order.
    shard(model, reshard_after_forward=False)
    # Sums of reduced gradients would read memory that FSDP may already have given to others.
    is_alone = mesh.size(mesh.ndim - 1) == 1 and config.accumulate_gradients == "full"
    if is_alone and torch.__version__.startswith("2.13."):
        from switchtitan.distributed.one_rank import use_few_kernels

        use_few_kernels(model)
    shard_buffers(model, mesh)


def shard_buffers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the buffers that modules declare, unless they are, with their values."""
    for module in model.modules():
        for name in module.sharded_buffers if isinstance(module, Reparametrized) else ():
            full = module.get_buffer(name)
            if not isinstance(full, DTensor):
                setattr(module, name, shard_buffer(full, mesh))
                copy_from_full_(module.get_buffer(name), full)


def _units(
    model: LanguageModel, config: ParallelismConfig
) -> Iterator[tuple[list[nn.Module], bool]]:
    """Yields modules whose weights are gathered together, in the order of their first calls, and
    whether they are freed after the forward pass."""
    blocks, size = list(model.blocks().values()), config.blocks_per_unit
    groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
    outer = model.outer_units()
    embeddings = [modules for modules in outer if isinstance(modules[0], nn.Embedding)]
    for modules in (*embeddings, *groups[:-1]):
        yield modules, config.reshard_after_forward
    # The backward pass needs these first.
    for modules in (*groups[-1:], *(modules for modules in outer if modules not in embeddings)):
        yield modules, False


def pack_frozen_weights(model: nn.Module) -> None:
    """Gives the frozen weights of replaced layers packed rows (`numerics.fixed_point`), without
    values; call on the meta device, before sharding."""
    for module in model.modules():
        weight = getattr(module, "weight", None) if isinstance(module, Reparametrized) else None
        if weight is not None and not weight.requires_grad:
            packed = pack(weight.detach())
            module.register_parameter("weight", nn.Parameter(packed, requires_grad=False))


def cast_trained(model: nn.Module, dtype: torch.dtype) -> None:
    """Changes the dtype of parameters that require a gradient; call on the meta device, before
    sharding."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@full_precision()
def materialize(
    model: LanguageModel,
    device: torch.device,
    seed: int,
    initial_weights: ReadRows | None = None,
    is_restored: bool = False,
) -> None:
    """Allocates a meta model's shards on `device` and fills them with its initial values.

    Every rank draws the rows that it holds in fp32, from (seed, parameter name); see
    `distributed.initial`. Ranks share layers that follow from their full plain weight. Parameters
    of another dtype round to nearest.

    Args:
        initial_weights: reads the plain model's parameters in place of drawn values: a warm start.
        is_restored: the caller overwrites all tensors of the state dict. They are not initialized,
            which can take minutes; buffers that no checkpoint has are.
    """
    _allocate(model, device)
    overwritten: Collection[str] = model.state_dict().keys() if is_restored else ()
    unfilled: dict[str, dict[str, Tensor]] = {}  # by module and local name
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in overwritten:
            module_name, _, local_name = name.rpartition(".")
            unfilled.setdefault(module_name, {})[local_name] = tensor
    start = InitialValues(model, seed, initial_weights, is_restored)
    # These need all rows of the plain weight, and may take a minute to decompose it.
    shared = [
        name
        for name, own in unfilled.items()
        if isinstance(model.get_submodule(name), Reparametrized)
        and not (is_restored or "weight" in own)
    ]

    def compute(name: str) -> list[Tensor]:
        all_rows = {local_name: range(len(t)) for local_name, t in unfilled[name].items()}
        return [*start.rows(name, all_rows).values()]

    results = [[*unfilled[name].values()] for name in shared]
    group = all_ranks_group(results[0][0]) if shared else None
    computed = compute_in_turns(shared.__getitem__, compute, results, device, group)
    items, num = unfilled.items(), len(unfilled)
    for name, own in progress_bar("initializing weights", items, total=num, unit="modules"):
        if name not in shared:
            start.fill(name, own)
            continue
        for tensor, value in zip(own.values(), next(computed), strict=True):
            copy_from_full_(tensor, value)


class InitialValues(NamedTuple):
    """The initial values of a model, or with `initial_weights` of any module; see `materialize`."""

    model: Any
    seed: int
    initial_weights: ReadRows | None
    is_restored: bool = False

    @torch.no_grad()
    def fill(self, module_name: str, own: Mapping[str, Tensor]) -> None:
        """Writes this rank's rows of a module's tensors, by local name."""
        values = self.rows(module_name, {key: row_range(tensor) for key, tensor in own.items()})
        for key, tensor in own.items():
            value = values[key]
            local(tensor).copy_(pack(value) if tensor.dtype == FIXED else value)

    def rows(self, module_name: str, held: Mapping[str, range]) -> dict[str, Tensor]:
        """Returns rows `held` of a module's tensors, by local name."""
        module = self.model.get_submodule(module_name)
        prefix = f"{module_name}." if module_name else ""
        rows, plain, values = dict(held), set(held), dict[str, Tensor]()
        if isinstance(module, Reparametrized):
            plain &= {"bias"}
            # The rows of the plain weight that the module's tensors follow from. Buffers that no
            # checkpoint has do not depend on it.
            shape = module.plain_shape
            needed = range(0 if self.is_restored else shape[0])
            rows["weight"] = covering_blocks(shape, held.get("weight", needed))
            weight = self._plain(f"{prefix}weight", shape, rows["weight"])
            values = module.initial_tensors(
                weight, lambda name: generator_for(self.seed, prefix + name), rows
            )
        for name in plain:
            values[name] = self._plain(prefix + name, getattr(module, name).shape, held[name])
        firsts = {name: held[name].start - rows[name].start for name in held}
        return {name: values[name][first:][: len(held[name])] for name, first in firsts.items()}

    def _plain(self, name: str, shape: tuple[int, ...], rows: range) -> Tensor:
        if self.initial_weights is not None and rows:
            return self.initial_weights(name, rows).to(torch.float32)
        return plain_value(self.model, self.seed, name, torch.Size(shape), rows)


def host_buffers(model: nn.Module) -> list[Tensor]:
    """Returns the buffers that modules keep in host memory."""
    modules = [module for module in model.modules() if isinstance(module, Reparametrized)]
    return [module.get_buffer(name) for module in modules for name in module.host_buffers]


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocates a meta model on `device`, except for buffers that stay in host memory."""
    on_host = set(host_buffers(model))
    replicated = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad and not isinstance(parameter, DTensor)
    ]

    def allocate(tensor: Tensor) -> Tensor:
        if tensor in on_host:
            return with_local(tensor, torch.empty_like(local(tensor), device="cpu"))
        return torch.empty_like(tensor, device=device)

    for module, name, _ in replicated:
        # `_apply` swaps tensors, which may fail for plain meta tensors.
        setattr(module, name, None)
    # As `to_empty` does it. FSDP gathers from the new memory.
    model._apply(allocate)
    for module, name, parameter in replicated:
        setattr(module, name, nn.Parameter(allocate(parameter), requires_grad=False))


def begin_micro_batch(model: nn.Module, config: ParallelismConfig, is_last: bool) -> None:
    """Makes the passes of a micro-batch reduce gradients and free weights as `config` says."""
    assert isinstance(model, FSDPModule)
    # Not `set_is_last_backward`: FSDP would keep the order of this forward pass, and gather the
    # head at the end of the next backward pass.
    if config.accumulate_gradients == "full":
        model.set_requires_gradient_sync(is_last)
    else:
        model.set_requires_all_reduce(is_last)
    if not config.reshard_after_forward:
        model.set_reshard_after_backward(is_last)


def free_gathered_weights(model: nn.Module) -> None:
    """Frees gathered weights after forward passes without a backward pass."""
    if isinstance(model, FSDPModule):
        # Not `reshard`, which keeps the order of these forward passes: the next backward pass would
        # gather the last unit of it once more.
        model.reset_iter_state()
