"""Every optimizer steps as torch's class or its formula, also with moments in 8 bits."""

from functools import partial

import pytest
import torch
from support.optimizer_steps import (
    SCALED,
    SCALED_TARGETED,
    build,
    draw,
    give_gradients,
    is_transposed,
    limit_elements_per_call,
    parameters,
    train,
)
from support.small_llama import draw_model
from support.tensors import differing
from support.tiny import model_on_meta, tiny_config
from torch import nn

from switchtitan.methods import METHODS
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.models import MODELS
from switchtitan.optim import adamw8bit
from switchtitan.optim.adamw import AdamWConfig
from switchtitan.optim.adamw8bit import AdamW8bitConfig
from switchtitan.optim.moments import block_size
from switchtitan.optim.muon import MuonConfig
from switchtitan.optim.parameters import trained_parameters
from switchtitan.optim.scale import ScaleConfig
from switchtitan.optim.torch_optimizer import AdafactorConfig, SGDConfig

LR, OTHER_LR, DECAY = 0.03, 0.007, 0.2
SHAPES = {
    "embed.weight": (6, 7),
    "layers.0.proj.weight": (5, 7),
    "layers.0.norm.weight": (5,),
    "layers.0.wide.weight": (64, 96),  # has moments in 8 bits
    "head.weight": (6, 5),
}
TARGETED = ("layers.0.proj.weight", "layers.0.wide.weight")
NUM_STEPS = 12
KEYS = {"lr": LR, "other_lr": OTHER_LR, "weight_decay": DECAY}
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=True)
# The section, and the class of torch.
CHOICES = {
    "adamw": (AdamWConfig(**KEYS), ADAMW),
    "sgd": (
        SGDConfig(**KEYS, momentum=0.8, nesterov=True),
        partial(torch.optim.SGD, momentum=0.8, nesterov=True, foreach=True),
    ),
    "sgd_without_momentum": (
        SGDConfig(**KEYS, momentum=0.0),
        partial(torch.optim.SGD, foreach=True),
    ),
    "adafactor": (
        AdafactorConfig(**KEYS, beta2_decay=-0.7, eps=1e-2, clip_threshold=1.5),
        partial(torch.optim.Adafactor, beta2_decay=-0.7, eps=(None, 1e-2), d=1.5),
    ),
}
ALL = {
    **{name: config for name, (config, _) in CHOICES.items()},
    "adamw8bit": AdamW8bitConfig(**KEYS),
    "muon": MuonConfig(**KEYS),
    "scale": ScaleConfig(**KEYS),
}


def ours(config, named):
    return build(config, named, TARGETED)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_optimizer_of_torch_steps_as_its_class_by_hand(choice):
    """One optimizer of torch for each parameter, whose rate and decay are written out; a norm waits
    in every third step, and keeps its own count of steps."""
    config, build_theirs = CHOICES[choice]
    named, theirs, before = parameters(SHAPES), parameters(SHAPES), parameters(SHAPES)
    optimizer = ours(config, named)
    peaks = {name: LR if name in TARGETED else OTHER_LR for name in SHAPES}
    optimizers = {
        name: build_theirs([parameter], weight_decay=0.0 if "norm" in name else DECAY)
        for name, parameter in theirs.items()
    }
    for step in range(NUM_STEPS):
        factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(factor)
        for name, grad in draw(SHAPES, step).items():
            waits = step % 3 == 1 and "norm" in name
            named[name].grad, theirs[name].grad = (None, None) if waits else (grad, grad.clone())
            optimizers[name].param_groups[0]["lr"] = peaks[name] * factor
            optimizers[name].step()
        optimizer.step()
    for name, expected in theirs.items():
        assert torch.equal(named[name], expected), name
        assert (expected - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("choice", ALL)
def test_state_moves_by_name_into_a_fresh_optimizer_which_continues_bitwise(choice):
    straight, first = parameters(SHAPES), parameters(SHAPES)
    train(ours(ALL[choice], straight), straight, range(9))
    optimizer = ours(ALL[choice], first)
    train(optimizer, first, range(4))
    saved = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    fresh = ours(ALL[choice], copies)
    # As in loading a checkpoint: load the tensors of the state, then notify the optimizer.
    state = fresh.state_dict()
    assert state.keys() == saved.keys()
    for key, tensor in state.items():
        tensor.copy_(saved[key])
    fresh.load_state_dict(state)
    train(fresh, copies, range(4, 9))
    assert differing(copies, straight) == []


@torch.no_grad()
@pytest.mark.parametrize("choice", ["adamw", "adamw8bit", "adafactor", "muon", "scale", "sgd"])
@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_a_gradient_of_zero_moves_nothing_but_by_decay_which_norms_have_if_the_section_says_so(
    choice, decay, decay_norms
):
    named = parameters(SHAPES)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    ours(type(ALL[choice])(lr=LR, weight_decay=decay, decay_norms=decay_norms), named).step()
    for name, value in parameters(SHAPES).items():
        expected = value * (1 - LR * decay) if decay_norms or "norm" not in name else value
        torch.testing.assert_close(named[name], expected, rtol=1e-6 if decay else 0, atol=0)


@pytest.mark.parametrize("choice", ALL)
def test_rates_are_reported_gradients_dropped_and_a_parameter_without_one_stays(choice):
    named, without = parameters(SHAPES), "layers.0.wide.weight"
    optimizer = ours(ALL[choice], named)
    optimizer.set_lr(0.25)
    expected = {"optimizer/lr": 0.25 * LR, "optimizer/other_lr": 0.25 * OTHER_LR}
    assert optimizer.metrics() == expected
    for waits in (True, False):
        for name, grad in draw(SHAPES, 0).items():
            named[name].grad = None if waits and name == without else grad
        optimizer.step()
        assert torch.equal(named[without], parameters(SHAPES)[without]) == waits
        assert not torch.equal(named["head.weight"], parameters(SHAPES)["head.weight"])
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in named.values())


# In 8 bits: blocks of 96 and of 127; too small; a vector.
EIGHT_BITS = {"a.weight": (64, 96), "b.weight": (33, 381), "c.weight": (3, 63), "d.weight": (96,)}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 4096), 256),
        ((64, 5461), 127),
        ((64, 1376), 172),
        ((64, 64), 64),
        ((64, 5449), None),  # a prime
        ((3, 64), 64),
        ((8192,), None),
    ],
)
def test_a_block_of_8_bit_codes_is_the_largest_divisor_of_a_row(shape, expected):
    assert block_size(shape) == expected


def test_with_8_bit_moments_parameters_stay_close_to_those_of_fp32_and_state_is_plain():
    before, named, exact = (parameters(EIGHT_BITS) for _ in range(3))
    optimizer = build(ALL["adamw8bit"], named)
    train(optimizer, named, range(NUM_STEPS))
    train(build(ALL["adamw"], exact), exact, range(NUM_STEPS))
    for name, parameter in named.items():
        moved = (exact[name] - before[name]).norm()
        in_8_bits = block_size(EIGHT_BITS[name]) is not None
        # A code has 3 to 7 bits of mantissa: a few per cent of each update.
        assert (parameter - exact[name]).norm() < (0.05 if in_8_bits else 1e-5) * moved, name
    state = optimizer.state_dict()
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    assert state["a.weight.exp_avg.codes"].dtype == torch.uint8
    assert state["a.weight.exp_avg.scale"].shape == (64, 1)
    assert state["b.weight.exp_avg_sq.scale"].shape == (33, 3)
    assert state["c.weight.exp_avg"].dtype == torch.float32
    assert all(tensor.any() for tensor in state.values())


def test_rows_that_rarely_have_gradients_move_no_further_in_8_bits():
    named = {"embed.weight": nn.Parameter(torch.zeros(200, 256))}
    embedding, optimizer = named["embed.weight"], build(AdamW8bitConfig(lr=1.0), named)
    generator, most = torch.Generator().manual_seed(0), 0.0
    for _ in range(60):
        rows = torch.randperm(200, generator=generator)[:4]
        embedding.grad = torch.zeros_like(embedding)
        # Gradients of very different sizes, so that small second moments have the least code.
        embedding.grad[rows] = torch.randn(4, 256, generator=generator) ** 5
        before = embedding.detach().clone()
        optimizer.step()
        most = max(most, (embedding.detach() - before).abs().max().item())
    # AdamW itself: at most 1.2.
    assert 0.5 < most < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_does_not_depend_on_how_many_rows_are_taken_at_a_time(monkeypatch, dtype):
    named, in_parts = (parameters(EIGHT_BITS, dtype=dtype) for _ in range(2))
    train(build(ALL["adamw8bit"], named), named, range(3))
    limit_elements_per_call(monkeypatch, adamw8bit, 1000)
    train(build(ALL["adamw8bit"], in_parts), in_parts, range(3))
    assert differing(in_parts, named) == []


def by_scale(matrix, mean, gradient, lr, config, is_head):
    """A step of SCALE on [in, out] in float64: the matrix, and the mean of its gradients."""
    mean = config.momentum * mean + (1 - config.momentum) * gradient
    taken = mean if is_head else gradient
    # Each column, an output, has a root mean square of 1.
    direction = taken / taken.square().mean(0).sqrt()
    return (1 - lr * config.weight_decay) * matrix - lr * direction, mean


def turned(name, matrix):
    return matrix.double() if is_transposed(name) else matrix.double().T


def test_every_step_of_scale_equals_a_reference_and_keeps_momentum_for_the_head_alone():
    keys = {"momentum": 0.8, "betas": (0.7, 0.97), "vector_lr": 0.05}
    config, norm = ScaleConfig(**KEYS, **keys), "layers.0.norm.weight"
    named, plain = parameters(SCALED), parameters(SCALED)
    optimizer = build(config, named, SCALED_TARGETED)
    matrices = {name: turned(name, value.detach()) for name, value in named.items() if name != norm}
    means = {name: torch.zeros_like(matrix) for name, matrix in matrices.items()}
    adamw = torch.optim.AdamW(
        [plain[norm]], betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )
    for step in range(NUM_STEPS):
        factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(factor)
        adamw.param_groups[0]["lr"] = config.vector_lr * factor
        gradients = give_gradients(named, SCALED, step)
        give_gradients(plain, SCALED, step)
        optimizer.step()
        adamw.step()
        for name, matrix in matrices.items():
            lr = (LR if name.startswith("layers.") else OTHER_LR) * factor
            gradient = turned(name, gradients[name])
            matrices[name], means[name] = by_scale(
                matrix, means[name], gradient, lr, config, name == "head.weight"
            )
            # Values of order 1, each step rounded at 6e-8.
            ours_now = turned(name, named[name])
            torch.testing.assert_close(ours_now, matrices[name], rtol=2e-6, atol=2e-6)
        assert torch.equal(named[norm], plain[norm])
    assert optimizer.metrics()["optimizer/vector_lr"] == config.vector_lr
    of_norm = {f"{norm}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
    assert optimizer.state_dict().keys() == {"head.weight.momentum"} | of_norm


def test_scale_is_told_which_matrices_are_stored_transposed_and_which_is_the_head():
    method = Lora(LoraConfig(rank=3), 10, 0)
    entries = method.trained_parameters(draw_model(method), AdamWConfig(lr=LR))
    is_transposed = {entry.name: entry.input_dim == 0 for entry in entries}
    assert is_transposed == {
        name: name.endswith(("embed_tokens.weight", "lora_b")) for name in is_transposed
    }
    assert [entry.name for entry in entries if entry.is_head] == ["lm_head.weight"]


def test_a_tied_head_is_no_head(tmp_path):
    config = tiny_config(tmp_path, "full_rank", "--model.tied_head", "true")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    assert not any(entry.is_head for entry in trained_parameters(model, ()))


SIZES = ("--model.hidden_size", "20", "--optimizer.tuned_hidden_size", "5")
RATES = ("--optimizer.lr", "0.8", "--optimizer.other_lr", "0.4", "--optimizer.weight_decay", "0.1")


@pytest.mark.parametrize(
    ("method", "optimizer", "layer", "factor", "other"),
    [
        # (5 / 20)^e, with e = 1, 1/2, 1/2 and 0, and as at full rank where no layer is targeted.
        ("full_rank", "adamw", "layers.0.mlp.up_proj.weight", 1 / 4, 1 / 4),
        ("full_rank", "muon", "layers.0.mlp.up_proj.weight", 1 / 2, 1 / 2),
        ("switchlora", "adamw", "layers.0.mlp.up_proj.lora_b", 1 / 2, 1 / 4),
        ("switchlora", "muon", "layers.0.mlp.up_proj.lora_a", 1.0, 1 / 2),
    ],
)
def test_rates_of_another_width_are_scaled_by_class_and_their_weight_decay_stays(
    tmp_path, caplog, method, optimizer, layer, factor, other
):
    targets = (
        ("--method.targets", '["up_proj"]', "--method.interval", "1e6")
        if method == "switchlora"
        else ()
    )
    config = tiny_config(tmp_path, method, *SIZES, *RATES, "--optimizer.name", optimizer, *targets)
    model = model_on_meta(config).to_empty(device="cpu")
    built = METHODS.build(config.method, 40, 0)
    with caplog.at_level("INFO", logger="switchtitan"):
        stepping = built.build_optimizer(model, config.optimizer, False)
    groups = stepping.parameter_groups()
    found = {name: (of.lr, of.lr * of.weight_decay) for of in groups for name in of.parameters}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0).grad = torch.zeros_like(parameter)
    stepping.set_lr(1.0)
    stepping.step()
    of_layer = model.get_parameter(f"model.{layer}")
    torch.testing.assert_close(of_layer, torch.full_like(of_layer, 0.92))
    down = "model.layers.1.mlp.down_proj.weight"
    expected = {
        f"model.{layer}": (0.8 * factor, 0.08),
        "lm_head.weight": (0.1, 0.04),
        "model.embed_tokens.weight": (0.4, 0.04),
        "model.norm.weight": (0.4, 0.0),
        down: (0.8 * other, 0.08) if method == "full_rank" else (0.4 * other, 0.04),
    }
    if method == "switchlora":
        assert f"other layers {0.4 * other:.3g} (x {other:.3g})" in caplog.text
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name
    assert "for hidden size 20, tuned at 5: embedding, norms 0.4 (x 1), " in caplog.text
    assert f"layers {0.8 * factor:.3g} (x {factor:.3g})" in caplog.text
    assert "head 0.1 (x 0.25)" in caplog.text
