"""Contexts that count a step's floating-point operations, collectives, and bytes sent by ranks."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count


class CountingMode(TorchDispatchMode, ABC):
    """A context that calls `count` after every operation on plain tensors, also in backward passes.

    An operation on DTensors counts as its operations on their parts.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps compiled regions compiled inside the context, which sees none of their insides."""
        return True

    @abstractmethod
    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        """Counts `result = func(*args, **kwargs)`, an operation of torch's dispatcher."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # A DTensor dispatches to operations on its local tensor, which are counted next.
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors in nested sequences and mappings; faster than torch's pytrees."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]


class CountFlops(CountingMode):
    """A context that counts this rank's FLOPs, including backward passes.

    A product of [m, k] and [k, n] is 2 m k n. Attention is counted as in PaLM (arXiv 2204.02311,
    appendix B): two products forward and four backward, without reduction for a causal mask or
    recomputation inside a fused kernel. Recomputation of checkpointed activations is counted.
    Element-wise operations, look-ups and matrix decompositions are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_flops = 0

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        self.num_flops += num_flops(func, args, kwargs, result)


def num_flops(func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the floating-point operations of a matrix product or attention; 0 for others."""
    operation = getattr(func, "overloadpacket", func)
    if operation.__name__.rstrip("_") in ("mm", "addmm", "bmm", "baddbmm"):
        # torch's formulas know neither those in place nor a dtype of the result.
        left, right = tensors_in(args)[-2:]
        return 2 * left.numel() * right.shape[-1]
    formula = flop_registry.get(operation)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)


# Operations for which torch has no formula. A step is estimated on a CPU.
register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)(
    lambda *shapes, **_: sdpa_flop_count(*shapes[:3])
)
register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)(
    lambda grad, *shapes, **_: 2 * sdpa_flop_count(*shapes[:3])
)


# Collectives.
class CollectiveCount(NamedTuple):
    """Collectives of one kind."""

    num_calls: int
    bytes_sent: float
    """Bytes that each rank sends to its neighbour in a ring."""


class CountCommunication(CountingMode):
    """A context that counts this rank's collectives, also in backward passes and of DTensors.

    Bytes are those that each rank sends with ring algorithms, which send the fewest bytes possible,
    on average over ranks. For a full (unsharded) tensor of S bytes and n ranks: all_gather,
    reduce_scatter and broadcast (n-1)/n S, all_reduce 2 (n-1)/n S; gather and scatter (n-1)/n of a
    shard, all_to_all (n-1)/n of a rank's input. S includes the rows with which FSDP2 pads uneven
    shards. Other NCCL algorithms, such as trees, and protocol overhead are not modeled. Raises a
    NotImplementedError at a collective of another kind.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = {kind: CollectiveCount(0, 0.0) for kind in _KINDS.values()}

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload) or func.namespace not in _NAMESPACES:
            return
        name = func._schema.name.partition("::")[2]
        if name in _SEND_NOTHING:
            return
        starts = (kind for start, kind in _KINDS.items() if name.lstrip("_").startswith(start))
        if (kind := next(starts, None)) is None:
            raise NotImplementedError(f"no rule for counting the bytes of {func}")
        parts = [args[_COUNTED[kind]]] if kind in _COUNTED else [*args, result]
        num_bytes = max(sum(tensor.nbytes for tensor in tensors_in(part)) for part in parts)
        num_ranks = group_of(args).size()
        # An all_reduce is a reduce_scatter and an all_gather (Patarasu and Yuan 2009, "Bandwidth
        # optimal all-reduce algorithms for clusters of workstations").
        num_passes = 2 if kind == "all_reduce" else 1
        sent = num_passes * (num_ranks - 1) / num_ranks * num_bytes
        num_calls, bytes_sent = self.counts[kind]
        self.counts[kind] = CollectiveCount(num_calls + 1, bytes_sent + sent)


def group_of(args: tuple) -> dist.ProcessGroup:
    """Returns the group of a collective: c10d operations carry it, functional ones its name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    return _resolve_process_group(args[-1])


_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_SEND_NOTHING = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")
_KINDS = {
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall_base": "all_to_all",
}
"""How an operation's name starts -> its kind. DTensors use others than `torch.distributed`."""
_COUNTED = {"gather": 1, "scatter": 0, "all_to_all": 1}
"""Kind -> the argument that counts: a shard, or a rank's input. Of other kinds it is the full
tensor, which is the largest of arguments and result."""
