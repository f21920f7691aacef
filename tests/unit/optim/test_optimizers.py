"""Every optimizer steps as torch's class or its formula; what does not fit is refused before any
work."""

from functools import partial

import pytest
import torch
from support.optimizer_steps import build, draw, parameters, train
from support.packages import needs_torchao
from support.scale_parameters import HEAD, TRANSPOSED, give_gradients, start, trained
from support.small_llama import draw_model
from support.tiny import tiny_config
from torch import nn

from switchtitan.errors import ConfigError
from switchtitan.methods.full_rank import FullRank, FullRankConfig
from switchtitan.methods.lora import Lora, LoraConfig
from switchtitan.models import MODELS
from switchtitan.optim import OPTIMIZERS, AdamWConfig, trained_parameters
from switchtitan.optim.adamw8bit import AdamW8bitConfig
from switchtitan.optim.muon import MuonConfig
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
METHOD_TREATS = ("layers.0.proj.weight", "layers.0.wide.weight")
NUM_STEPS = 12
KEYS = {"lr": LR, "other_lr": OTHER_LR, "weight_decay": DECAY}
ADAMW = partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-8, fused=True)
# The section, and the class of torch.
CHOICES = {
    "adamw": (AdamWConfig(**KEYS), ADAMW),
    "sgd": (
        SGDConfig(**KEYS, momentum=0.8, nesterov=True),
        partial(torch.optim.SGD, momentum=0.8, nesterov=True),
    ),
    "sgd_without_momentum": (SGDConfig(**KEYS, momentum=0.0), torch.optim.SGD),
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


def marked(names):
    return [pytest.param(name, marks=needs_torchao if "8bit" in name else ()) for name in names]


def ours(config, named, compile_step=False):
    return build(config, named, METHOD_TREATS, compile_step)


def train_both(choice):
    """Steps ours and one optimizer of torch for each parameter, whose rate and decay are written
    out; a norm waits in every third step, and keeps its own count of steps."""
    config, build_theirs = CHOICES[choice]
    named, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer = ours(config, named)
    optimizers = {
        name: build_theirs(
            [parameter],
            lr=LR if name in METHOD_TREATS else OTHER_LR,
            weight_decay=0.0 if "norm" in name else DECAY,
        )
        for name, parameter in theirs.items()
    }
    peaks = {name: each.param_groups[0]["lr"] for name, each in optimizers.items()}
    for step in range(NUM_STEPS):
        factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(factor)
        for name, grad in zip(SHAPES, draw(SHAPES, step), strict=True):
            waits = step % 3 == 1 and "norm" in name
            named[name].grad, theirs[name].grad = (None, None) if waits else (grad, grad.clone())
            optimizers[name].param_groups[0]["lr"] = peaks[name] * factor
            optimizers[name].step()
        optimizer.step()
    return named, theirs


@pytest.mark.parametrize("choice", CHOICES)
def test_every_optimizer_of_torch_steps_as_its_class_by_hand(choice):
    named, theirs = train_both(choice)
    before = parameters(SHAPES)
    for name, expected in theirs.items():
        assert torch.equal(named[name], expected), name
        assert (expected - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("choice", marked(ALL))
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
    for name, expected in straight.items():
        assert torch.equal(copies[name], expected), name


@pytest.mark.parametrize("choice", ["sgd", "sgd_without_momentum"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_is_the_same_to_rounding_and_compiles_once(choice):
    named, eager = parameters(SHAPES), parameters(SHAPES)
    optimizer = ours(ALL[choice], named, compile_step=True)
    train(optimizer, named, range(2))
    num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, named, range(2, NUM_STEPS))
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] == num_graphs
    train(ours(ALL[choice], eager), eager, range(NUM_STEPS))
    for name, expected in eager.items():
        # Updates of order 0.01, each rounded in another order in fp32.
        torch.testing.assert_close(named[name], expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_norms_decay_like_all_others_if_the_section_says_so():
    for decays in (False, True):
        named = parameters(SHAPES)
        config = SGDConfig(lr=LR, weight_decay=DECAY, decay_norms=decays, momentum=0.0)
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        ours(config, named).step()
        for name, value in parameters(SHAPES).items():
            expected = value * (1 - LR * DECAY) if decays or "norm" not in name else value
            torch.testing.assert_close(named[name], expected, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("choice", marked(ALL))
def test_rates_are_reported_gradients_dropped_and_a_step_without_any_changes_nothing(choice):
    named = parameters(SHAPES)
    optimizer = ours(ALL[choice], named)
    optimizer.set_lr(0.25)
    expected = {"optimizer/lr": 0.25 * LR, "optimizer/other_lr": 0.25 * OTHER_LR}
    assert optimizer.metrics() == expected
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())
    optimizer.step()
    for name, before in parameters(SHAPES).items():
        assert torch.equal(named[name], before), name


@pytest.mark.parametrize("choice", ["adamw", "adafactor", "muon", "scale"])
def test_a_gradient_of_zero_moves_nothing_but_by_decay(choice):
    named = parameters(SHAPES)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    ours(type(ALL[choice])(lr=LR), named).step()
    for name, before in parameters(SHAPES).items():
        assert torch.equal(named[name], before), name


class ScaleReference:
    """SCALE for one matrix in float64, as a linear map [in, out]: columns are outputs."""

    def __init__(self, name, weight, config):
        self.config, self.is_transposed, self.is_head = config, name not in TRANSPOSED, name == HEAD
        self.weight = self.turned(weight.detach().double().clone())
        self.mean = torch.zeros_like(self.weight)

    def turned(self, matrix):
        return matrix.T if self.is_transposed else matrix

    def step(self, gradient, lr):
        gradient, config = self.turned(gradient.double()), self.config
        self.mean = config.momentum * self.mean + (1 - config.momentum) * gradient
        taken = self.mean if self.is_head else gradient
        for column in range(taken.shape[1]):
            direction = taken[:, column] / (taken[:, column].norm() / len(taken) ** 0.5)
            kept = (1 - lr * config.weight_decay) * self.weight[:, column]
            self.weight[:, column] = kept - lr * direction


def test_every_step_of_scale_equals_a_reference_and_keeps_momentum_for_the_head_alone():
    keys = {"momentum": 0.8, "betas": (0.7, 0.97), "vector_lr": 0.05}
    config, norm = ScaleConfig(**KEYS, **keys), "layers.0.norm.weight"
    named, plain = start(), start()
    optimizer = OPTIMIZERS.build(config, trained(named), False)
    references = {
        name: ScaleReference(name, value, config) for name, value in named.items() if value.ndim > 1
    }
    adamw = torch.optim.AdamW(
        [plain[norm]], betas=config.betas, eps=config.eps, weight_decay=0.0, fused=True
    )
    for step in range(NUM_STEPS):
        factor = (step + 1) / NUM_STEPS
        optimizer.set_lr(factor)
        adamw.param_groups[0]["lr"] = config.vector_lr * factor
        gradients = give_gradients(named, step)
        give_gradients(plain, step)
        optimizer.step()
        adamw.step()
        for name, reference in references.items():
            reference.step(
                gradients[name], (LR if name.startswith("layers.") else OTHER_LR) * factor
            )
            expected = reference.turned(reference.weight)
            # Values of order 1, each step rounded at 6e-8.
            torch.testing.assert_close(named[name].double(), expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(named[norm], plain[norm])
    assert optimizer.metrics()["optimizer/vector_lr"] == config.vector_lr
    of_norm = {f"{norm}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
    assert optimizer.state_dict().keys() == {f"{HEAD}.momentum"} | of_norm


@pytest.mark.parametrize(
    "method",
    [FullRank(FullRankConfig(), 10, 0), Lora(LoraConfig(rank=3), 10, 0)],
    ids=lambda method: type(method).__name__,
)
def test_a_first_update_of_scale_has_the_size_of_the_rate_for_each_output_of_a_matrix(method):
    """Outputs are columns of the embedding and of factors that are stored transposed."""
    model, lr = draw_model(method), 0.01
    optimizer = method.build_optimizer(model, ScaleConfig(lr=lr), compile_step=False)
    momenta = [key for key in optimizer.state_dict() if "momentum" in key]
    assert momenta == ["lm_head.weight.momentum"]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.ndim == 1:
            continue
        inputs = 0 if name.endswith(("embed_tokens.weight", "lora_b")) else 1
        sizes = (parameter - before[name]).square().mean(inputs).sqrt()
        # Differences of values of order 0.1, rounded at 1e-8.
        torch.testing.assert_close(sizes, torch.full_like(sizes, lr), rtol=1e-4, atol=0, msg=name)


def test_a_tied_head_is_no_head_and_scale_refuses_a_model_that_names_none(tmp_path):
    config = tiny_config(tmp_path, "full_rank", "--model.tied_head", "true")
    with torch.device("meta"):
        model = MODELS.build(config.model)
    entries = trained_parameters(model, (), model.blocks(), model.output_head())
    assert not any(entry.is_head for entry in entries)
    with pytest.raises(ConfigError, match=r'"scale".*no head'):
        OPTIMIZERS.build(ScaleConfig(lr=LR), entries, False)


@pytest.mark.parametrize(
    ("method", "keys", "fragments"),
    [
        ("galore", "--optimizer.name sgd", ("galore", "sgd")),
        ("apollo", "--optimizer.name muon", ("apollo", "muon")),
        ("relora", "--optimizer.name adafactor", ("relora", "adafactor")),
        ("switchlora", "--optimizer.name sgd", ("switchlora", "adamw or muon")),
        ("full_rank", "--optimizer.name scale --model.tied_head true", ("scale", "tied")),
        (
            "full_rank",
            "--optimizer.name adafactor --compile.optimizer true",
            ("adafactor", "compile"),
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(tmp_path, method, keys, fragments):
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, method, *keys.split())
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_nesterov_without_momentum_has_no_effect():
    config = SGDConfig(**KEYS, momentum=0, nesterov=True)
    assert config.without_effect() == ["nesterov = true has no effect with momentum = 0"]
    ours(config, {"weight": torch.ones(5, 7)})
