"""Whole runs of SwitchLoRA on a float64 LLaMA, next to the reference, and the authors' run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from support.small_llama import SEED, draw_model, loss_and_gradients
from support.switchlora_layers import build_optimizer, freeze_steps_left, vector_steps
from support.switchlora_reference import (
    ReferenceLayer,
    ReferenceSwitchLora,
    constant_candidates,
    switch_rate,
)
from switchtitan.methods.adapter.linear import adapter_layers
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.methods.switchlora.method import SwitchLoraLinear
from switchtitan.optim.adamw import AdamWConfig

NUM_STEPS = 60
RANK = 5  # k_proj and v_proj are [6, 12]: one candidate on each side waits, so their limit is felt
ADAMW = AdamWConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decay_norms=True)
TOLERANCE = 1e-9  # float64 rounds at 1e-16; sixty steps of Adam with eps 1e-6 amplify by up to 1e5

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "linear_multi.npz"
GOLDEN_RANK, GOLDEN_FREEZE_STEPS, NUM_GOLDEN_STEPS = 20, 5, 40
GOLDEN_TOLERANCE = 2e-6  # fp32, forty steps of Adam; an independent port reached 2.4e-7


def build_ours(config, compile_step=False):
    method = SwitchLora(config, NUM_STEPS, seed=SEED)
    model = draw_model(method)
    return model, method.build_optimizer(model, ADAMW, compile_step)


def initial_candidates(config, name, layer):
    """Of A and B, [candidates, width]: the layer's if stored, recomputed if constant."""
    if config.candidates == "swap":
        return layer.candidates_a, layer.candidates_b
    out_features, in_features = layer.weight.shape
    # Of balanced factors: uniform numbers have bounds of 3^(1/2) deviations.
    bound_a = 3**0.25 * (RANK * out_features**0.5 / in_features**1.5) ** 0.25
    bound_b = 3**0.25 * (RANK / (out_features * in_features) ** 0.5) ** 0.25
    count = min(layer.weight.shape)
    return (
        constant_candidates(SEED, f"{name}.lora_a", count, in_features, bound_a).double(),
        constant_candidates(SEED, f"{name}.lora_b", count, out_features, bound_b).double(),
    )


def build_reference(config):
    """Use the same initial candidates; compute their selection and W independently."""
    model, drawn = draw_model(), adapter_layers(build_ours(config)[0])
    layers = {}
    for name, ours in drawn.items():
        layers[name] = ReferenceLayer(
            model.get_submodule(name).weight.detach().clone(),
            *initial_candidates(config, name, ours),
            config.rank,
            config.alpha / config.rank,
            puts_back=config.candidates == "swap",
            resets=config.reset_moments,
        )
        model.set_submodule(name, layers[name])
    factors = {id(factor) for layer in layers.values() for factor in (layer.A, layer.B)}
    optimizer = ReferenceSwitchLora(
        list(layers.values()),
        [parameter for parameter in model.parameters() if id(parameter) not in factors],
        rates=[switch_rate(config, step, NUM_STEPS) for step in range(NUM_STEPS)],
        interval=config.interval,
        freeze_steps=config.freeze_steps,
        **ADAMW.model_dump(include={"lr", "betas", "eps", "weight_decay"}),
    )
    return model, layers, optimizer


def run_step(model, optimizer, step):
    """Train one step on its own batch; return the loss."""
    loss = loss_and_gradients(model, step)
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    return loss


def pairs_of_tensors(name, layer, state, reference):
    """Ours and the reference's, by local name."""
    pairs = {"weight": (layer.weight, reference.W)}
    for factor, side in (("a", reference.of_a), ("b", reference.of_b)):
        pairs[f"lora_{factor}"] = layer.get_parameter(f"lora_{factor}"), side.vectors
        if reference.puts_back:
            candidates = layer.get_buffer(f"candidates_{factor}")
            pairs[f"candidates_{factor}"] = candidates, side.candidates
        for key, moment in (("exp_avg", side.mean), ("exp_avg_sq", side.square)):
            pairs[f"lora_{factor}.{key}"] = state[f"{name}.lora_{factor}.{key}"], moment
    return pairs


def check_whole_run(config, compile_step=False, num_steps=NUM_STEPS):
    """Switches, freezing and weight decay together, every tensor after every step."""
    ours, optimizer = build_ours(config, compile_step=compile_step)
    theirs, their_layers, reference = build_reference(config)
    for step in range(num_steps):
        loss = run_step(ours, optimizer, step)
        assert loss == pytest.approx(run_step(theirs, reference, step), abs=TOLERANCE)
        state = optimizer.state_dict()
        assert state["switch.num_switched"].tolist() == reference.num_switched
        for index, (name, layer) in enumerate(adapter_layers(ours).items()):
            other = their_layers[name]
            timers = freeze_steps_left(state, config.freeze_steps)[:, index].tolist()
            steps = vector_steps(optimizer)[:, index].tolist()
            assert timers == [other.of_a.rest, other.of_b.rest]
            assert steps == [other.of_a.steps, other.of_b.steps]
            for key, pair in pairs_of_tensors(name, layer, state, other).items():
                check_close(*pair, f"{name}.{key}, step {step}")
        check_metrics(optimizer, reference)
    for name, parameter in theirs.named_parameters():
        if not name.endswith((".A", ".B")):
            check_close(ours.get_parameter(name), parameter, name)
    assert min(reference.num_switched) > 2, "too few switches to test anything"


def check_close(tensor, expected, name):
    """Like `torch.testing.assert_close`, which takes as long as a step for so many tensors."""
    assert tensor.shape == expected.shape, name
    assert tensor.dtype == expected.dtype == torch.float64, name
    difference = (tensor.detach() - expected.detach()).abs().max().item()
    assert difference <= TOLERANCE, f"{name} is off by {difference}"


def check_metrics(optimizer, reference):
    metrics = optimizer.metrics()
    num_vectors = 2 * RANK * len(reference.layers)
    assert metrics["switch/frozen_share"] == pytest.approx(reference.last_resting / num_vectors)
    assert metrics["switch/vectors_switched_total"] == 2 * sum(reference.num_switched)
    coverage = [
        min(layer.num_candidates, RANK + switched) / layer.num_candidates
        for layer, switched in zip(reference.layers, reference.num_switched, strict=True)
    ]
    assert metrics["switch/candidate_coverage"] == pytest.approx(sum(coverage) / len(coverage))


def build_golden(golden, compile_step):
    """The layer of the recorded run, and its optimizer."""
    hyper = json.loads(str(golden["hyper_json"]))
    layer = SwitchLoraLinear(28, 23, GOLDEN_RANK, hyper["scaling"], (1.0, 1.0))
    layer.store_candidates(on_host=False)
    names = {"weight": "W", "lora_a": "A", "candidates_a": "poolA", "candidates_b": "poolB"}
    tensors = {name: torch.from_numpy(golden[f"mlp.init.{key}"]) for name, key in names.items()}
    layer.load_state_dict(tensors | {"lora_b": torch.from_numpy(golden["mlp.init.B"]).T})
    config = SwitchLoraConfig(
        rank=GOLDEN_RANK, interval=10, decay="constant", freeze_steps=GOLDEN_FREEZE_STEPS
    )
    keys = AdamWConfig(lr=hyper["lr"])
    optimizer = build_optimizer(config, keys, [layer], NUM_GOLDEN_STEPS, compile_step=compile_step)
    return layer, optimizer


def check_golden_trajectory(compile_step=False):
    """Follows the run that was recorded from the original implementation, see tests/data/golden."""
    with np.load(GOLDEN) as file:
        golden = dict(file)
    layer, optimizer = build_golden(golden, compile_step)
    timers = torch.zeros(2, GOLDEN_RANK)
    shares_of_frozen = []
    for t in range(NUM_GOLDEN_STEPS):
        x, y = torch.from_numpy(golden["x"][t]), torch.from_numpy(golden["y"][t])
        loss = (layer(x) - y).square().mean()
        assert loss.item() == pytest.approx(float(golden["loss"][t]), rel=GOLDEN_TOLERANCE)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([layer.lora_a, layer.lora_b], 1.0)
        # Of all vectors, frozen ones included.
        assert norm.item() == pytest.approx(float(golden["grad_norm"][t]), rel=1e-5)
        squares = torch.stack([f.grad.square().sum(1) for f in (layer.lora_a, layer.lora_b)])
        shares_of_frozen.append((squares[timers > 0].sum() / squares.sum()).item())
        optimizer.step()
        optimizer.zero_grad()

        state = optimizer.state_dict()
        assert state["switch.num_switched"].item() == 2 * (t + 1)
        timers = freeze_steps_left(state, GOLDEN_FREEZE_STEPS)[:, 0]
        steps = vector_steps(optimizer)[:, 0]
        for index, side in enumerate("AB"):
            np.testing.assert_array_equal(timers[index], golden[f"mlp.fix{side}"][t])
            np.testing.assert_array_equal(steps[index], golden[f"mlp.step{side}"][t])
        for tensor, name in (
            (layer.weight, "W"),
            (layer.lora_a, "A"),
            (layer.lora_b.T, "B"),
            (state["layer0.lora_a.exp_avg"], "mA"),
            (state["layer0.lora_a.exp_avg_sq"], "vA"),
            (state["layer0.lora_b.exp_avg"].T, "mB"),
            (state["layer0.lora_b.exp_avg_sq"].T, "vB"),
        ):
            check_golden(tensor, golden[f"mlp.{name}"][t], f"{name} after step {t}")

    # Without them, the norm would miss the recorded one.
    assert max(shares_of_frozen) > 0.01

    for candidates, factor in ((layer.candidates_a, "A"), (layer.candidates_b, "B")):
        waiting = np.setdiff1d(np.arange(23), golden[f"mlp.sel{factor}"][-1])
        check_golden(candidates[waiting], golden[f"mlp.final.pool{factor}"][waiting], factor)


def check_golden(tensor, expected, name):
    found = tensor.detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=GOLDEN_TOLERANCE, err_msg=name)
