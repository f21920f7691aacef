"""Contexts that count collectives and the bytes that ranks send each other."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass_type,
)


class CountingMode(TorchDispatchMode, ABC):
    """A context that calls `count` after every operation on plain tensors.

    Operations of backward passes are included. An operation on DTensors is counted as its
    operations on local shards and its collectives, one on torchao's tensors as its operations on
    their parts.
    """

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


_PASSES = {
    "all_gather": 1,
    "reduce_scatter": 1,
    "all_reduce": 2,
    "broadcast": 1,
    "gather": 1,
    "scatter": 1,
    "all_to_all": 1,
}
"""Number of passes round the ring. An all_reduce is a reduce_scatter and an all_gather
(Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations")."""


@dataclass(frozen=True)
class CollectiveCount:
    """Collectives of one kind."""

    num_calls: int
    bytes_sent: float
    """Bytes that each rank sends to its neighbour in a ring."""


CommunicationCounts = Mapping[str, CollectiveCount]
"""By kind: "all_gather", "reduce_scatter", "all_reduce", "broadcast", "gather", "scatter",
"all_to_all". Kinds that did not occur have zeros."""


class CountCommunication(CountingMode):
    """A context that counts this rank's collectives, also in backward passes and of DTensors.

    Bytes are those that each rank sends with ring algorithms, which send the fewest bytes possible.
    For a full (unsharded) tensor of S bytes and n ranks: all_gather and reduce_scatter (n-1)/n S,
    all_reduce 2 (n-1)/n S, broadcast (n-1)/n S averaged over ranks. Gather and scatter send shards
    directly to or from one rank: (n-1)/n of a shard on average. All_to_all sends directly too:
    (n-1)/n of a rank's input on average. S includes the rows with which FSDP2 pads uneven shards.
    Other NCCL algorithms, such as trees, and protocol overhead are not modeled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._num_calls = dict.fromkeys(_PASSES, 0)
        self._bytes_sent = dict.fromkeys(_PASSES, 0.0)
        self._unknown: set[str] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Keeps compiled regions, which contain no collectives, compiled inside the context."""
        return True

    @property
    def counts(self) -> CommunicationCounts:
        """Counts of all collectives so far.

        Raises:
            NotImplementedError: if one of them is of an unknown kind.
        """
        if self._unknown:
            raise NotImplementedError(
                f"no rule for counting the bytes of {', '.join(sorted(self._unknown))}"
            )
        return {
            kind: CollectiveCount(self._num_calls[kind], self._bytes_sent[kind]) for kind in _PASSES
        }

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        if isinstance(func, torch._ops.OpOverload) and func.namespace in _NAMESPACES:
            self._count_collective(func, args, result)

    def _count_collective(self, func: torch._ops.OpOverload, args: tuple, result: object) -> None:
        name = func._schema.name.partition("::")[2]
        if name in _NOT_COUNTED:
            return
        if name not in _COLLECTIVES:
            # `counts` raises, so that the counted code is not interrupted.
            self._unknown.add(str(func))
            return
        kind, tensors = _COLLECTIVES[name]
        num_ranks = group_of(args).size()
        self._num_calls[kind] += 1
        self._bytes_sent[kind] += (
            _PASSES[kind] * (num_ranks - 1) / num_ranks * _num_bytes(tensors(args, result))
        )


def _num_bytes(tensors: object) -> int:
    """Bytes of a tensor, or of all tensors in nested lists."""
    if isinstance(tensors, Tensor):
        return prod(tensors.shape) * tensors.element_size()
    assert isinstance(tensors, Sequence), f"no tensors: {tensors!r}"
    return sum(map(_num_bytes, tensors))


def group_of(args: tuple) -> dist.ProcessGroup:
    """Returns the group of a collective: c10d operations carry it, functional ones its name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            return dist.ProcessGroup.unbox(argument)
    return _resolve_process_group(args[-1])


def _first(args: tuple, result: object) -> object:
    return args[0]


def _second(args: tuple, result: object) -> object:
    return args[1]


def _result(args: tuple, result: object) -> object:
    return result


_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
_NOT_COUNTED = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")
"""Operations that send no tensors."""
_COLLECTIVES: dict[str, tuple[str, Callable[[tuple, object], object]]] = {
    # c10d, in place.
    "_allgather_base_": ("all_gather", _first),
    "allgather_": ("all_gather", _first),
    "allgather_into_tensor_coalesced_": ("all_gather", _first),
    "_reduce_scatter_base_": ("reduce_scatter", _second),
    "reduce_scatter_": ("reduce_scatter", _second),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", _second),
    "allreduce_": ("all_reduce", _first),
    "allreduce_coalesced_": ("all_reduce", _first),
    "broadcast_": ("broadcast", _first),
    "gather_": ("gather", _second),
    "scatter_": ("scatter", _first),
    "alltoall_base_": ("all_to_all", _second),
    # _c10d_functional, which DTensors use.
    "all_gather_into_tensor": ("all_gather", _result),
    "all_gather_into_tensor_out": ("all_gather", _result),
    "all_gather_into_tensor_coalesced": ("all_gather", _result),
    "reduce_scatter_tensor": ("reduce_scatter", _first),
    "reduce_scatter_tensor_out": ("reduce_scatter", _first),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", _first),
    "all_reduce": ("all_reduce", _first),
    "all_reduce_": ("all_reduce", _first),
    "all_reduce_coalesced": ("all_reduce", _first),
    "all_reduce_coalesced_": ("all_reduce", _first),
    "broadcast": ("broadcast", _first),
}
"""Operation -> its kind, and a function that returns the tensors that count, given (arguments,
result): full tensors, but for gather and scatter a shard, and for all_to_all a rank's input."""
