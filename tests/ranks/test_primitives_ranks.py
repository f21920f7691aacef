"""What optimizers and methods do with shards, over 2, 4 and 2 x 2 of four ranks: the same as with
full tensors, and with few collectives."""

import math
from functools import partial
from math import sqrt

import pytest
import torch
import torch.distributed as dist
from support import optimizer_steps
from support.layouts import asked_for
from support.optimizer_steps import SCALED, SCALED_TARGETED, build, parameters
from support.projected_models import RANK, TARGETS, draw_gradients, draw_model, give_gradients
from support.ranks import run_rows_on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from switchtitan.distributed.replicas import check_replicas, compute_in_turns
from switchtitan.distributed.rows import RowSpans, ShardedRows, copy_all_, gather_rows, paired_rows
from switchtitan.distributed.shards import (
    copy_from_full_,
    full_tensor,
    row_range,
    shard_buffer,
    shard_group,
)
from switchtitan.methods import METHODS
from switchtitan.methods.projected import ApolloConfig, FiraConfig, GaloreConfig
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig
from switchtitan.optim.muon import MuonConfig
from switchtitan.optim.scale import ScaleConfig
from switchtitan.workbench.benchmark.counters import CountCommunication

NUM_RANKS = 4
LAYOUTS = ("2", "4", "2x2")
CPU = torch.device("cpu")


def mesh_of(name):
    """Two pairs of ranks that do the same, four shards, or two replicas of two shards."""
    if name == "4":
        return init_device_mesh("cpu", (4,))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return mesh["shard"] if name == "2" else mesh


def num_collectives(part):
    with CommDebugMode() as communication:
        part()
    return communication.get_total_counts()


INTERVAL = 4
"""Steps from one new basis of a projecting method to the next."""


def check_updates(mesh, start, num_between, tolerance):
    """Sharded parameters are updated as full ones are, with a number of collectives.

    Args:
        start: of a mesh or None; returns named parameters, their optimizer, and what gives them the
            gradients of a step.
        num_between: collectives of a step that draws no new basis.
        tolerance: of parameters and state.
    """
    (named, optimizer, give), (split, split_optimizer, give_split) = start(None), start(mesh)
    for step in range(10):
        give(step)
        give_split(step)
        assert num_collectives(optimizer.step) == 0
        num_together = num_collectives(split_optimizer.step)
        assert step % INTERVAL == 0 or num_together == num_between, step
    of_one, of_all = named | optimizer.state_dict(), split | split_optimizer.state_dict()
    check_replicas(of_all, CPU)
    for name, tensor in of_one.items():
        found, bounds = full_tensor(of_all[name]).detach(), {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(found, tensor.detach(), **bounds, msg=name)


# Muon. Over 2 and 4 ranks: even, uneven, and fewer rows than ranks. Two of one shape.
SHAPES = {
    "layers.0.even.weight": (8, 5),
    "layers.0.uneven.weight": (7, 9),
    "layers.1.uneven.weight": (7, 9),
    "layers.0.short.weight": (1, 6),
    "layers.0.tall.weight": (13, 3),
    "layers.0.norm.weight": (5,),
    "head.weight": (11, 5),
}
FEW = {name: SHAPES[name] for name in ("layers.0.even.weight", "layers.0.uneven.weight")}


def build_muon(shapes, mesh=None):
    named, config = parameters(shapes, mesh), MuonConfig(lr=0.02, weight_decay=0.1)
    give = partial(optimizer_steps.give_gradients, named, shapes, mesh=mesh)
    return named, build(config, named), give


# AdamW in 8 and 24 bits, elementwise.
def build_short(mesh=None):
    shapes = {"head.weight": (3, 64), "layers.0.norm.weight": (5,)}
    named = parameters(shapes, mesh, torch.bfloat16)
    give = partial(optimizer_steps.give_gradients, named, shapes, mesh=mesh)
    return named, build(AdamW8bitConfig(lr=0.02, weight_decay=0.1), named), give


# SCALE. On four shards, one rank holds no row of three, five, six or nine.
def build_scale(mesh=None):
    named = parameters(SCALED, mesh)
    config = ScaleConfig(lr=0.03, other_lr=0.007, weight_decay=0.2, momentum=0.8)
    give = partial(optimizer_steps.give_gradients, named, SCALED, mesh=mesh)
    return named, build(config, named, SCALED_TARGETED), give


# GaLore, Fira and APOLLO. One of four ranks holds no row of five, and none of three.
PROJECTED = {"rank": RANK, "update_interval": INTERVAL, "targets": TARGETS}
# With the number of collectives in steps that keep their bases.
PROJECTING = {
    "galore": (GaloreConfig(**PROJECTED), 2),
    "fira": (FiraConfig(**PROJECTED), 3),
    "apollo": (ApolloConfig(**PROJECTED), 2),
    "apollo_mini": (ApolloConfig(**PROJECTED | {"rank": 1}, scaling="tensor", scale=sqrt(7)), 2),
}
ADAM = AdamWConfig(lr=0.03, betas=(0.8, 0.97), weight_decay=0.1, decay_norms=True)


def projecting(name, model):
    return METHODS.build(PROJECTING[name][0], 10, 3).build_optimizer(model, ADAM, False)


def build_projected(name, mesh=None):
    model, gradients = draw_model(mesh=mesh), list(draw_gradients(10))
    optimizer = projecting(name, model)
    give = lambda step: give_gradients(model, gradients[step], mesh)  # noqa: E731
    return dict(model.named_parameters()), optimizer, give


# Rows of SwitchLoRA. Over 4 and over 2 ranks: uneven, and fewer than ranks.
ROW_SHAPES = [(11, 3), (6, 5), (3, 7), (1, 2)]


def bits(tensor):
    """The bit patterns: nan equals itself, and -0.0 differs from 0.0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def draw_rows(shape, dtype):
    """Random values, a denormal one, -0.0, nan and -inf."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=dtype)
    values.view(-1)[min(2, values.numel() - 1)] = torch.finfo(dtype).smallest_normal / 3
    values[0, 0] = -0.0
    values[-1, -1] = math.nan
    values[shape[0] // 2, 1] = -math.inf
    return values


def buffer_of(value, mesh):
    tensor = shard_buffer(torch.empty_like(value), mesh)
    copy_from_full_(tensor, value)
    return tensor


def masked(value, tensor):
    """The full value, with zeros in rows that this rank does not hold."""
    held = row_range(tensor)
    rest = torch.zeros_like(value)
    rest[held.start : held.stop] = value[held.start : held.stop]
    return rest


def spans_of(num_rows):
    """The last and the first rows, as at the end of a ring."""
    if num_rows < 3:
        return (range(num_rows),)
    return range(num_rows - 2, num_rows), range(num_rows // 2)


def check_row_exchange(mesh):
    for dtype in (torch.float32, torch.float64):
        check_row_exchange_of(mesh, dtype)


def check_row_exchange_of(mesh, dtype):
    values = [draw_rows(shape, dtype) for shape in ROW_SHAPES]
    tensors = [buffer_of(value, mesh) for value in values]
    spans = [spans_of(len(value)) for value in values]
    indices = [[row for span in wanted for row in span] for wanted in spans]
    group = shard_group(tensors[0])
    requests = [RowSpans(ShardedRows(t), wanted) for t, wanted in zip(tensors, spans, strict=True)]
    with CountCommunication() as communication:
        gathered = gather_rows(requests, group)
    assert sum(count.num_calls for count in communication.counts.values()) == 1
    for rows, value, wanted in zip(gathered, values, indices, strict=True):
        assert rows.dtype == value.dtype
        assert torch.equal(bits(rows), bits(value[wanted]))

    parts = [
        RowSpans(ShardedRows(masked(value, tensor)), (range(len(value)),))
        for value, tensor in zip(values, tensors, strict=True)
    ]
    for rows, value in zip(gather_rows(parts, group), values, strict=True):
        assert torch.equal(bits(rows), bits(value)), "each rank fills in its rows of a plain tensor"

    new = [-2 * rows - 1 for rows in gathered]
    copy_all_(paired_rows(requests, new))
    everything = [RowSpans(ShardedRows(t), (range(len(t)),)) for t in tensors]
    again = gather_rows(everything, group)
    for value, wanted, rows, found in zip(values, indices, new, again, strict=True):
        value[wanted] = rows
        assert torch.equal(bits(found), bits(value))


def check_turns(mesh):
    """A rank computes when the others no longer wait for it."""
    order, results = [], [[torch.zeros(())] for _ in range(6)]

    def collect(place):
        order.append("collect")
        dist.all_reduce(torch.ones(()))
        return place

    def compute(place):
        order.append("compute")
        return [torch.tensor(float(place))]

    computed = compute_in_turns(collect, compute, results, CPU, dist.group.WORLD)
    assert [value.item() for (value,) in computed] == [0, 1, 2, 3, 4, 5]
    first, second = ["collect"] * 4, ["collect"] * 2
    has_second = dist.get_rank() < 2
    assert order == [*first, "compute", *second, *["compute"] * has_second]


CHECKS = {
    # Batches of another size may be multiplied in another order, in fp32.
    **{
        f"muon on {name}": (check_updates, name, partial(build_muon, SHAPES), 2, 1e-5)
        for name in LAYOUTS
    },
    "muon of fewer matrices than ranks": (check_updates, "4", partial(build_muon, FEW), 2, 1e-5),
    # Sums over ranks have another order: 6e-8 a step.
    **{f"scale on {name}": (check_updates, name, build_scale, 1, 2e-6) for name in LAYOUTS},
    **{f"short on {name}": (check_updates, name, build_short, 0, 0) for name in LAYOUTS},
    **{
        f"{method} on {name}": (
            *(check_updates, name, partial(build_projected, method), num_between, 2e-6),
        )
        for method, (_, num_between) in PROJECTING.items()
        for name in ("2", "4")
    },
    **{f"row exchange on {name}": (check_row_exchange, name) for name in LAYOUTS},
    "work in turns": (check_turns, "4"),
}


def check_one(rank, name):
    check, mesh, *args = CHECKS[name]
    check(mesh_of(mesh), *args)


@pytest.fixture(scope="module")
def errors(request):
    return run_rows_on_ranks(NUM_RANKS, check_one, asked_for(request, CHECKS))


@pytest.mark.parametrize("name", CHECKS)
def test_shards_compute_what_full_tensors_do_with_few_collectives(errors, name):
    assert name not in errors, errors[name]
