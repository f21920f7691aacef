"""The optimizer of an applied method does what users of torch's optimizers expect."""

import io
from functools import partial

import pytest
import torch
from support.loops import (
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
from torch.optim import lr_scheduler

from switchtitan import apply
from switchtitan.errors import CheckpointError, ConfigError

KINDS = {
    "switchlora": {},
    "constant": {"candidates": "constant"},
    "muon": {"optimizer": "muon"},
    "relora": {"name": "relora", "rank": 6, "reset_interval": 3, "restart_warmup_steps": 2},
    "galore": {"name": "galore", "rank": 6, "update_interval": 3},
    "apollo": {"name": "apollo", "rank": 6, "update_interval": 3},
}


def start(kind="switchlora", seed=0):
    keys = KINDS[kind]
    if "name" in keys:
        keys = {"num_steps": SWITCHING["num_steps"], **keys}
    return start_loop(build_llama(seed), **keys)


def cosine(optimizer):
    return lr_scheduler.CosineAnnealingLR(optimizer, SWITCHING["num_steps"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit_from_its_state_dicts(kind):
    model, _, optimizer = start(kind)
    scheduler = cosine(optimizer)
    run_loop(model, optimizer, range(5), scheduler)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
    file.seek(0)
    losses = run_loop(model, optimizer, range(5, 10), scheduler)
    again, _, other = start(kind, seed=1)
    parts = again, other, cosine(other)
    for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert run_loop(again, other, range(5, 10), parts[2]) == losses
    tensors = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in tensors)


def test_torch_s_checkpoint_functions_take_no_step():
    model, _, optimizer = start()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = get_optimizer_state_dict(model, optimizer)
    assert num_switched(optimizer) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    names = {f"{name}.{key}" for name, own in state["state"].items() for key in own}
    assert "model.layers.0.mlp.up_proj.lora_b.exp_avg" in names
    run_loop(model, optimizer, range(2))
    assert {
        f"{name}.{key}"
        for name, own in get_optimizer_state_dict(model, optimizer)["state"].items()
        for key in own
    } == names


@pytest.mark.parametrize(
    "build",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 1e-2, 40, cycle_momentum=False),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), cosine(optimizer)], [3]
        ),
    ],
)
def test_a_scheduler_s_rates_are_those_of_a_loop_that_sets_them(build):
    model, _, optimizer = start()
    scheduler, rates, losses = build(optimizer), [], []
    for step in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        losses += run_loop(model, optimizer, [step], scheduler)
    again, _, other = start()
    for step, rate in enumerate(rates):
        for group in other.param_groups:
            group["lr"] = rate
        assert run_loop(again, other, [step]) == losses[step : step + 1]
    assert len(set(rates)) > 3


def test_a_scheduler_of_betas_and_new_groups_are_refused():
    _model, _, optimizer = start()
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(optimizer, 1e-2, 40)
    with pytest.raises(ConfigError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 1.0})


def test_other_lr_makes_groups_that_have_rates_of_their_own():
    model = build_llama()
    method = apply(model, **SWITCHING | {"interval": 1e6})
    optimizer = method.optimizer(lr=1e-2, other_lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-2]
    optimizer.param_groups[1]["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_loop(model, optimizer, range(2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "_proj" not in name}


def test_closures_hooks_and_set_to_none_work():
    model, _, optimizer = start()
    expected = run_loop(model, optimizer, range(3))
    model, _, optimizer = start()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad(set_to_none=False)
            loss = loss_of(model, draw_tokens(step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return loss

        assert optimizer.step(closure).item() == expected[step]
    assert calls == ["before", "after"] * 3


@pytest.mark.parametrize("num_before", [0, 3])
def test_parameters_that_move_are_followed(num_before):
    """`model.to` gives them new memory; an address of its own stands for that of a GPU."""
    model, _, optimizer = start()
    losses = run_loop(model, optimizer, range(6))
    model, _, optimizer = start()
    run_loop(model, optimizer, range(num_before))
    model._apply(lambda tensor: tensor.clone())
    assert run_loop(model, optimizer, range(num_before, 6)) == losses[num_before:]


def test_a_model_with_new_parameters_needs_a_new_optimizer():
    model, _, optimizer = start()
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone())
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is head.weight)
    loss_of(model, draw_tokens(0)).backward()
    with pytest.raises(ConfigError, match="new parameters"):
        optimizer.step()


def test_the_state_of_another_method_is_refused():
    lora = start_loop(name="lora", rank=6, num_steps=9)[2].state_dict()
    with pytest.raises(CheckpointError, match=r"lacks switch\.step"):
        start("constant")[2].load_state_dict(
            lora | {"param_groups": start()[2].state_dict()["param_groups"]}
        )


def test_parts_of_a_batch_accumulate():
    model, _, optimizer = start()
    expected = run_loop(model, optimizer, range(4))
    model, _, optimizer = start()
    losses = []
    for step in range(4):
        parts = draw_tokens(step % 3).chunk(2)
        total = 0.0
        for part in parts:
            loss = loss_of(model, part) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)  # sums in another order


def test_a_step_that_a_grad_scaler_skips_switches_nothing():
    model, _, optimizer = start()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=100)
    for step in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, draw_tokens(step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert num_switched(optimizer) == 0
    scaler.update(2.0)
    with torch.autocast("cpu", torch.float16):
        scaler.scale(loss_of(model, draw_tokens(3))).backward()
    scaler.step(optimizer)
    assert num_switched(optimizer) > 0


def test_a_gradient_that_is_not_finite_reaches_the_weights_as_in_torch_s_adamw():
    model, method, optimizer = start()
    loss_of(model, draw_tokens(0)).backward()
    layer = method.layers["model.layers.0.mlp.up_proj"]
    layer.lora_a.grad[0, 0] = torch.nan
    optimizer.step()
    assert layer.lora_a[0, 0].isnan()


def test_a_compiled_model_is_not_compiled_again_in_later_steps():
    """One graph serves several numbers of tokens."""
    torch._dynamo.reset()
    losses = [losses_of_shapes(lambda model: model)]
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = losses_of_shapes(partial(torch.compile, backend="eager", fullgraph=True))
    assert counters["stats"]["unique_graphs"] == 2  # of the first shape, then of any length
    torch.testing.assert_close([compiled], losses, atol=1e-5, rtol=0)


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
