"""What is sent: collectives and bytes are counted as a ring sends them, on ranks whose collectives
do nothing; and what is computed before sending."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from support.tiny import tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from switchtitan.distributed.fsdp import free_gathered_weights
from switchtitan.distributed.replicas import digest
from switchtitan.optim.matrix_exchange import balanced_owners
from switchtitan.workbench.benchmark.counters import CollectiveCount, CountCommunication
from switchtitan.workbench.benchmark.steppers import fake_batches, fake_stepper

NUM_RANKS = 5
FULL = 5 * 3 * 4
"""Bytes of [5, 3] in fp32."""


@pytest.fixture
def ranks():
    """Rank 2 of five."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=NUM_RANKS)


def full():
    return torch.zeros(NUM_RANKS, 3)


def parts():
    return list(full().split(1))


def shard():
    return torch.zeros(1, 3)


def distributed(part, placement):
    return DTensor.from_local(part, init_device_mesh("cpu", (NUM_RANKS,)), [placement])


def redistributed(placement):
    """What a sum over ranks becomes."""
    return distributed(full(), Partial()).redistribute(placements=[placement]).to_local()


@pytest.mark.parametrize(
    ("collective", "kind", "bytes_sent"),
    [
        (lambda: dist.all_gather_into_tensor(full(), shard()), "all_gather", FULL * 4 / 5),
        (lambda: dist.all_gather(parts(), shard()), "all_gather", FULL * 4 / 5),
        (lambda: dist.reduce_scatter_tensor(shard(), full()), "reduce_scatter", FULL * 4 / 5),
        (lambda: dist.reduce_scatter(shard(), parts()), "reduce_scatter", FULL * 4 / 5),
        (lambda: dist.all_reduce(full()), "all_reduce", 2 * FULL * 4 / 5),
        (lambda: dist.all_reduce(full().bfloat16()), "all_reduce", FULL * 4 / 5),
        (lambda: dist.broadcast(full(), src=2), "broadcast", FULL * 4 / 5),
        (lambda: dist.gather(shard(), parts(), dst=2), "gather", FULL / 5 * 4 / 5),
        (lambda: dist.scatter(shard(), parts(), src=2), "scatter", FULL / 5 * 4 / 5),
        (lambda: dist.all_to_all_single(full(), full()), "all_to_all", FULL * 4 / 5),
        (lambda: distributed(shard(), Shard(0)).full_tensor(), "all_gather", FULL * 4 / 5),
        (lambda: redistributed(Shard(0)), "reduce_scatter", FULL * 4 / 5),
        (lambda: redistributed(Replicate()), "all_reduce", 2 * FULL * 4 / 5),
        # A smaller group sends less.
        (lambda: dist.all_reduce(full(), group=dist.new_group([1, 2])), "all_reduce", FULL),
    ],
)
def test_bytes_are_those_of_a_ring(ranks, collective, kind, bytes_sent):
    with CountCommunication() as counter:
        collective()
    counts = dict(counter.counts)
    assert counts.pop(kind) == CollectiveCount(1, pytest.approx(bytes_sent))
    assert set(counts.values()) == {CollectiveCount(0, 0.0)}


def test_barriers_send_nothing_and_unknown_collectives_raise(ranks):
    with CountCommunication() as counter:
        dist.barrier()
        assert set(counter.counts.values()) == {CollectiveCount(0, 0.0)}
        with pytest.raises(NotImplementedError, match="alltoall_"):
            dist.all_to_all(parts(), parts())


# Weights between steps.
def evaluate(stepper, seq_len):
    (batch,) = next(fake_batches(2, seq_len, num_micro_batches=1))
    loss = partial(stepper.loss, targets=batch.targets, divisor=1)
    with torch.no_grad():
        for _ in range(3):
            stepper.model(batch.tokens, batch.document_ids, loss)
    free_gathered_weights(stepper.model)


@pytest.mark.parametrize(("method", "is_freed"), [("full_rank", "true"), ("lora", "false")])
def test_a_step_after_an_evaluation_sends_what_one_before_it_sends(tmp_path, method, is_freed):
    keys = ("--parallelism.reshard_after_forward", is_freed)
    config = tiny_config(tmp_path, method, *keys, num_ranks=2)
    with fake_stepper(config, 2) as stepper:
        stepper.step()
        counts = []
        for _ in range(2):
            with CountCommunication() as communication:
                stepper.step()
            counts.append(communication.counts)
            evaluate(stepper, config.data.seq_len)
    assert counts[0]["all_gather"].num_calls >= 3
    assert counts[1] == counts[0]


# Exchanges of matrices and rows. On ranks: see tests/ranks/test_primitives_ranks.py.
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 50])
def test_owners_share_the_cost(num_ranks):
    costs = [float(1 + place % 7 + 10 * (place % 3 == 0)) for place in range(41)]
    loads = [0.0] * num_ranks
    for cost, owner in zip(costs, balanced_owners(costs, num_ranks), strict=True):
        loads[owner] += cost
    # Of the best that any owners could have (Graham 1969).
    assert max(loads) <= 4 / 3 * max(sum(costs) / num_ranks, max(costs))


# Digests of replicas.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (11,), (3, 8)])
def test_a_digest_depends_on_every_value_and_its_position(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    own = digest(tensor)
    assert own.shape == ()
    # Not on its place in memory.
    wider = torch.zeros([size + 3 for size in shape], dtype=dtype)
    part = wider[tuple(slice(1, size + 1) for size in shape)].copy_(tensor)
    shifted = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(shape)
    for copy in (tensor.clone(), part, shifted, tensor.t().contiguous().t()):
        assert torch.equal(digest(copy), own)
    flat = tensor.view(-1)
    for index in range(len(flat)):
        before = flat[index].clone()
        flat[index] = -before  # one bit
        assert digest(tensor) != own
        flat[index] = before
    for first in range(len(flat)):
        for second in range(first):
            swapped = flat.clone()
            swapped[[first, second]] = flat[[second, first]]
            assert digest(swapped.view(shape)) != own or flat[first] == flat[second]
