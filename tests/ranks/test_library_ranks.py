"""Loops of other people on two ranks: DDP, FSDP2, HSDP, meta devices, torch's checkpoints."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.loops import SWITCHING, build_llama, draw_tokens, loss_of, run_loop
from support.ranks import run_on_ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from switchtitan import apply
from switchtitan.errors import ConfigError

KINDS = {
    "switchlora": {"name": "switchlora", **SWITCHING},
    "drawn, muon": {"name": "switchlora", **SWITCHING, "candidates": "constant"},
    "galore": {"name": "galore", "rank": 6, "update_interval": 4, "num_steps": 40},
}
CASES = [
    ("ddp", "switchlora"),
    ("ddp", "galore"),
    *(("fsdp", kind) for kind in KINDS),
    ("hsdp", "drawn, muon"),
    ("meta", "switchlora"),
]


def start(wrapper, kind, seed=0):
    """Returns what is called, the method and its optimizer."""
    model = build_llama(seed)
    weights = model.state_dict()
    if wrapper == "meta":
        with torch.device("meta"):
            model = build_llama()
    method = apply(model, **KINDS[kind])
    called = model
    if wrapper == "ddp":
        called = DistributedDataParallel(model)
    elif wrapper != "plain":
        shape, names = ((2, 1), ("replicate", "shard")) if wrapper == "hsdp" else ((2,), None)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=mesh)
    if wrapper == "meta":
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, weights, options=options)
        for name, buffer in build_llama().named_buffers():
            model.get_buffer(name).copy_(buffer)
        method.initialize()
    name = "muon" if "muon" in kind else "adamw"
    return called, method, method.optimizer(name, lr=1e-2, betas=(0.9, 0.95))


def train(called, optimizer, steps):
    """Each rank has its part of the batch; returns the mean loss of all ranks."""
    rank, num_ranks, losses = dist.get_rank(), dist.get_world_size(), []
    for step in steps:
        loss = loss_of(called, draw_tokens(step % 3).chunk(num_ranks)[rank])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / num_ranks
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def check_ranks(rank, expected):
    for wrapper, kind in CASES:
        called, method, optimizer = start(wrapper, kind)
        losses = train(called, optimizer, range(6))
        # Ranks sum gradients in another order.
        torch.testing.assert_close(
            losses, expected[kind], atol=1e-5, rtol=0, msg=f"{wrapper} {kind}"
        )
        with torch.no_grad():  # FSDP2 leaves weights unsharded after it
            loss = loss_of(called, draw_tokens(9))
        dense = method.dense_state_dict()
        if wrapper != "ddp" and rank > 0:
            assert not dense
            continue
        plain = build_llama(1)
        plain.load_state_dict(dense)
        torch.testing.assert_close(loss_of(plain, draw_tokens(9)).detach(), loss)


def test_losses_on_two_ranks_are_those_on_one():
    expected = {}
    for kind in KINDS:
        model, _, optimizer = start("plain", kind)
        expected[kind] = run_loop(model, optimizer, range(6))
    run_on_ranks(2, check_ranks, expected)


def check_checkpoint(rank, folder, wrapper):
    called, method, optimizer = start(wrapper, "switchlora")
    train(called, optimizer, range(4))
    weights, state = get_state_dict(called, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    losses = train(called, optimizer, range(4, 8))
    again, _, other = start(wrapper, "switchlora", seed=1)
    weights, state = get_state_dict(again, other)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=weights, optim_state_dict=state)
    assert train(again, other, range(4, 8)) == losses
    if wrapper == "fsdp":
        with pytest.raises(ConfigError, match="dense_state_dict"):
            method.merge()
        with pytest.raises(ConfigError, match="apply first"):
            apply(fully_shard(build_llama()), **SWITCHING)
        names = build_llama().state_dict().keys() if rank == 0 else set()
        assert method.base_state_dict().keys() == names


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_torch_s_distributed_checkpoints_resume_bit_for_bit(wrapper, tmp_path):
    run_on_ranks(2, check_checkpoint, str(tmp_path / "saved"), wrapper)


def check_late_sharding(rank, expected):
    model = build_llama()
    method = apply(model, **SWITCHING)
    optimizer = method.optimizer(lr=1e-2, betas=(0.9, 0.95))
    optimizer.load_state_dict(optimizer.state_dict())
    old = dict(model.named_parameters())
    fully_shard(model)
    loss_of(model, draw_tokens(0)).backward()
    with pytest.raises(ConfigError, match="after fully_shard"):
        optimizer.step()
    model.zero_grad()
    names = {parameter: name for name, parameter in old.items()}
    for group in optimizer.param_groups:  # as accelerate does it
        group["params"] = [model.get_parameter(names[parameter]) for parameter in group["params"]]
    losses = train(model, optimizer, range(6))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        loss_of(model, draw_tokens(9))
    assert optimizer.state_dict()["state"][0]["switch.step"] == 6


def test_an_optimizer_of_before_fully_shard_follows_its_groups_or_is_refused():
    model, _, optimizer = start("plain", "switchlora")
    run_on_ranks(2, check_late_sharding, run_loop(model, optimizer, range(6)))
