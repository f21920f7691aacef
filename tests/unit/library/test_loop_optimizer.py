"""The optimizer of an applied method does what users of torch's optimizers expect."""

import io
from functools import partial

import pytest
import torch
from support.loops import (
    NUM_STEPS,
    SWITCHING,
    build_llama,
    draw_tokens,
    loss_of,
    num_switched,
    run_loop,
    start_loop,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from switchtitan import apply
from switchtitan.errors import CheckpointError, ConfigError

RELORA = {"name": "relora", "reset_interval": 3, "restart_warmup_steps": 2}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"candidates": "constant"},
        {"optimizer": "muon"},
        RELORA | {"rank": 6, "num_steps": NUM_STEPS},
        {"name": "galore", "rank": 6, "update_interval": 3, "num_steps": NUM_STEPS},
        {"name": "apollo", "rank": 6, "update_interval": 3, "num_steps": NUM_STEPS},
    ],
)
def test_a_run_resumes_bit_for_bit_from_its_state_dicts(keys):
    model, _, optimizer = start_loop(**keys)
    scheduler, file = CosineAnnealingLR(optimizer, NUM_STEPS), io.BytesIO()
    run_loop(model, optimizer, range(5), scheduler)
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
    file.seek(0)
    losses = run_loop(model, optimizer, range(5, 10), scheduler)
    again, _, other = start_loop(build_llama(seed=1), **keys)
    parts = again, other, CosineAnnealingLR(other, NUM_STEPS)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert run_loop(again, other, range(5, 10), parts[2]) == losses
    tensors = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in tensors)


def test_torch_s_checkpoint_functions_take_no_step():
    model, _, optimizer = start_loop()

    def saved_names():
        state = get_optimizer_state_dict(model, optimizer)["state"]
        return {f"{name}.{key}" for name, own in state.items() for key in own}

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = saved_names()
    assert num_switched(optimizer) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert "model.layers.0.mlp.up_proj.lora_b.exp_avg" in names
    run_loop(model, optimizer, range(2))
    assert saved_names() == names


def one_cycle(optimizer):
    return OneCycleLR(optimizer, 1e-2, NUM_STEPS, cycle_momentum=False)


def linear_then_cosine(optimizer):
    parts = [LinearLR(optimizer), CosineAnnealingLR(optimizer, NUM_STEPS)]
    return SequentialLR(optimizer, parts, [3])


@pytest.mark.parametrize("build", [one_cycle, linear_then_cosine])
def test_a_scheduler_s_rates_are_those_of_a_loop_that_sets_them(build):
    model, _, optimizer = start_loop()
    scheduler, rates, losses = build(optimizer), [], []
    for step in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        losses += run_loop(model, optimizer, [step], scheduler)
    assert len(set(rates)) > 3
    again, _, other = start_loop()
    assert run_loop(again, other, range(6))[1:] != losses[1:]
    again, _, other = start_loop()
    for step, rate in enumerate(rates):
        for group in other.param_groups:
            group["lr"] = rate
        assert run_loop(again, other, [step]) == losses[step : step + 1]


def test_groups_have_rates_of_their_own_and_nothing_else():
    model = build_llama()
    method = apply(model, **SWITCHING | {"interval": 1e6})
    optimizer = method.optimizer(lr=1e-2, other_lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    optimizer.param_groups[1]["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_loop(model, optimizer, range(2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "_proj" not in name}
    with pytest.raises(ValueError, match="cycle_momentum"):
        OneCycleLR(optimizer, 1e-2, NUM_STEPS)
    with pytest.raises(ConfigError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0})


def test_closures_hooks_and_zeroed_gradients_work():
    model, _, optimizer = start_loop()
    expected = run_loop(model, optimizer, range(3))
    model, _, optimizer = start_loop()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure(step):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, draw_tokens(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss.item()

    assert [optimizer.step(partial(closure, step)) for step in range(3)] == expected
    assert calls == ["before", "after"] * 3


@pytest.mark.parametrize("num_before", [0, 3])
def test_parameters_that_move_are_followed(num_before):
    """`model.to` gives them new memory; an address of its own stands for that of a GPU."""
    model, _, optimizer = start_loop()
    losses = run_loop(model, optimizer, range(6))
    model, _, optimizer = start_loop()
    run_loop(model, optimizer, range(num_before))
    model._apply(torch.clone)
    assert run_loop(model, optimizer, range(num_before, 6)) == losses[num_before:]


@pytest.mark.parametrize("keys", [{"name": "lora", "rank": 6, "num_steps": 9}, {"rank": 5}])
def test_the_state_of_another_method_or_rank_is_refused(keys):
    model, _, optimizer = start_loop()
    other = start_loop(**keys)[2].state_dict()
    with pytest.raises(CheckpointError, match=r"it is another method's, rank's or model's"):
        optimizer.load_state_dict(other)
    assert run_loop(model, optimizer, [0]) == run_loop(*start_loop()[::2], [0])


def test_a_step_that_a_grad_scaler_skips_switches_nothing():
    model, _, optimizer = start_loop()
    for scale, is_taken in ((2.0**60, False), (2.0, True)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, draw_tokens(0))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        assert (num_switched(optimizer) > 0) == is_taken


def test_a_gradient_that_is_not_finite_reaches_the_weights_as_in_torch_s_adamw():
    model, method, optimizer = start_loop()
    loss_of(model, draw_tokens(0)).backward()
    layer = method.layers["model.layers.0.mlp.up_proj"]
    layer.lora_a.grad[0, 0] = torch.nan
    optimizer.step()
    assert layer.lora_a[0, 0].isnan()


def losses_of_shapes(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    optimizer = apply(model, **SWITCHING, targets=["0", "2"]).optimizer(lr=1e-2)
    called, losses = wrap(model), []
    for step in range(9):
        x = torch.randn(2, 5 + step % 3, 12)
        loss = (called(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_compiled_model_is_not_compiled_again_in_later_steps():
    """One graph serves several numbers of tokens."""
    torch._dynamo.reset()
    expected, counters = losses_of_shapes(lambda model: model), torch._dynamo.utils.counters
    counters.clear()
    losses = losses_of_shapes(partial(torch.compile, backend="eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 2  # of the first shape, then of any length
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
