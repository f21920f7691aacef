"""Collectives are counted with the bytes of ring algorithms."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from switchtitan.distributed.count_collectives import (
    CollectiveCount,
    CountCommunication,
    CountingMode,
)

NUM_RANKS = 5
FULL = 5 * 3 * 4
"""Bytes of [5, 3] in fp32."""


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    """Rank 2 of five, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=NUM_RANKS)
    yield
    dist.destroy_process_group()


def full() -> torch.Tensor:
    return torch.zeros(NUM_RANKS, 3)


def shard() -> torch.Tensor:
    return torch.zeros(1, 3)


@pytest.mark.parametrize(
    ("collective", "kind", "bytes_sent"),
    [
        (lambda: dist.all_gather_into_tensor(full(), shard()), "all_gather", FULL * 4 / 5),
        (lambda: dist.all_gather(list(full().split(1)), shard()), "all_gather", FULL * 4 / 5),
        (lambda: dist.reduce_scatter_tensor(shard(), full()), "reduce_scatter", FULL * 4 / 5),
        (
            lambda: dist.reduce_scatter(shard(), list(full().split(1))),
            "reduce_scatter",
            FULL * 4 / 5,
        ),
        (lambda: dist.all_reduce(full()), "all_reduce", 2 * FULL * 4 / 5),
        (lambda: dist.all_reduce(full().bfloat16()), "all_reduce", FULL * 4 / 5),
        (lambda: dist.broadcast(full(), src=2), "broadcast", FULL * 4 / 5),
        (lambda: dist.gather(shard(), list(full().split(1)), dst=2), "gather", FULL / 5 * 4 / 5),
        (
            lambda: dist.scatter(shard(), list(full().split(1)), src=2),
            "scatter",
            FULL / 5 * 4 / 5,
        ),
        (lambda: dist.all_to_all_single(full(), full()), "all_to_all", FULL * 4 / 5),
    ],
)
def test_bytes_are_those_of_a_ring(collective, kind, bytes_sent) -> None:
    with CountCommunication() as counter:
        collective()
    counts = dict(counter.counts)
    assert counts.pop(kind) == CollectiveCount(1, pytest.approx(bytes_sent))
    assert set(counts.values()) == {CollectiveCount(0, 0.0)}


def test_a_smaller_group_sends_less() -> None:
    group = dist.new_group([1, 2])
    with CountCommunication() as counter:
        dist.all_reduce(full(), group=group)
    assert counter.counts["all_reduce"] == CollectiveCount(1, FULL)


def test_collectives_of_dtensors_are_counted() -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    sharded = DTensor.from_local(shard(), mesh, [Shard(0)])
    partial = DTensor.from_local(full(), mesh, [Partial()])
    with CountCommunication() as counter:
        sharded.full_tensor()
        partial.redistribute(placements=[Shard(0)]).to_local()
        partial.redistribute(placements=[Replicate()]).to_local()
    sent = {kind: count.bytes_sent for kind, count in counter.counts.items()}
    once = pytest.approx(FULL * 4 / 5)
    assert sent == {
        "all_gather": once,
        "reduce_scatter": once,
        "all_reduce": pytest.approx(2 * FULL * 4 / 5),
        "broadcast": 0,
        "gather": 0,
        "scatter": 0,
        "all_to_all": 0,
    }


def test_only_collectives_inside_are_counted_also_in_backward() -> None:
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    sharded = DTensor.from_local(shard().requires_grad_(), mesh, [Shard(0)])
    dist.all_reduce(full())
    loss = sharded.full_tensor(grad_placements=[Partial()]).sum()
    with CountCommunication() as counter:
        loss.backward()
    assert counter.counts["reduce_scatter"].num_calls == 1
    assert counter.counts["all_gather"].num_calls == counter.counts["all_reduce"].num_calls == 0


def test_barriers_send_nothing_and_unknown_collectives_raise() -> None:
    with CountCommunication() as counter:
        dist.barrier()
        assert set(counter.counts.values()) == {CollectiveCount(0, 0.0)}
        dist.all_to_all(list(full().split(1)), list(full().split(1)))
    with pytest.raises(
        NotImplementedError, match=r"no rule for counting the bytes of c10d\.alltoall_\."
    ):
        counter.counts  # noqa: B018


class RecordOperations(CountingMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def count(self, func: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
        self.names.append(func.name())


def test_an_operation_on_a_tensor_of_two_is_counted_as_one_on_each() -> None:
    two = TwoTensor(torch.ones(3), torch.ones(3))
    with RecordOperations() as recorded:
        torch.abs(two)
    assert recorded.names == ["aten::abs", "aten::abs"]
