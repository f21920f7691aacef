"""The optimizer equals a literal re-implementation over torch's AdamW, on a float64 LLaMA."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.seeds import generator_for
from switchtitan.methods.lowrank import low_rank_layers
from switchtitan.methods.relora import Relora, ReloraConfig
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.optim import AdamWConfig

SEED, NUM_STEPS, INTERVAL, WARMUP, VOCABULARY = 3, 28, 7, 3, 29
MODEL = LlamaConfig(
    name="llama",
    size="9m",
    hidden_size=12,
    intermediate_size=17,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=VOCABULARY,
    init_std=0.2,
)
ADAMW = AdamWConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decay_norms=True)
TOLERANCE = 1e-10  # float64 rounds at 1e-16; Adam with eps 1e-6 amplifies by up to 1e5


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relora(num_steps=NUM_STEPS, seed=SEED, **keys):
    config = ReloraConfig(
        rank=5, alpha=2.5, reset_interval=INTERVAL, restart_warmup_steps=WARMUP, **keys
    )
    return Relora(config, num_steps, seed)


def draw_model(method):
    """The model of a method with its initial values, in the default dtype."""
    plain = MODELS.build(MODEL)
    values = {
        name: plain.initial_value(name, p.shape, generator_for(SEED, name)).to(p)
        for name, p in plain.named_parameters()
    }
    method.prepare_model(plain)
    with torch.no_grad():
        for prefix, module in plain.named_modules():
            own = {
                name: values.get(f"{prefix}.{name}")
                for name, _ in module.named_parameters(recurse=False)
            }
            if isinstance(module, Reparametrized):
                own = module.initial_tensors(
                    own["weight"],
                    lambda name, prefix=prefix: generator_for(SEED, f"{prefix}.{name}"),
                )
            for name, value in own.items():
                module.get_parameter(name).copy_(value)
    return plain


def build(method, adamw=ADAMW):
    model = draw_model(method)
    return model, method.build_optimizer(model, adamw, compile_step=False)


class ReferenceLayer(nn.Module):
    def __init__(self, ours):
        super().__init__()
        self.W, self.scale = ours.weight.detach().clone(), ours.scale
        self.A = nn.Parameter(ours.lora_a.detach().clone())
        self.B = nn.Parameter(ours.lora_b.detach().clone())

    def forward(self, x):
        return x @ self.W.T + self.scale * (x @ self.A.T) @ self.B


class Reference:
    """All parameters in one torch optimizer; resets as in the paper's Algorithm 1."""

    def __init__(self, method_keys):
        self.keys = method_keys
        self.model = draw_model(relora(**method_keys))
        self.layers = {
            name: ReferenceLayer(layer) for name, layer in low_rank_layers(self.model).items()
        }
        for name, layer in self.layers.items():
            parent, _, local_name = name.rpartition(".")
            setattr(self.model.get_submodule(parent), local_name, layer)
        # Not fused, so that the implementation is independent.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=ADAMW.lr,
            betas=ADAMW.betas,
            eps=ADAMW.eps,
            weight_decay=ADAMW.weight_decay,
            foreach=False,
        )

    def set_lr(self, step, factor):
        since, restarted = step % INTERVAL, step >= INTERVAL
        jagged = (since + 1) / WARMUP if restarted and since < WARMUP else 1.0
        self.optimizer.param_groups[0]["lr"] = ADAMW.lr * factor * jagged

    @torch.no_grad()
    def finish(self, step):
        self.optimizer.step()
        number, rest = divmod(step + 1, INTERVAL)
        if rest or step + 1 == NUM_STEPS:
            return
        for name, layer in self.layers.items():
            layer.W += layer.scale * layer.B.T @ layer.A
            bound = 1 / math.sqrt(layer.A.shape[1])
            layer.A.uniform_(
                -bound, bound, generator=generator_for(SEED, f"{name}.lora_a:{number}")
            )
            layer.B.zero_()
            for factor, factor_name in ((layer.A, "lora_a"), (layer.B, "lora_b")):
                self.prune(factor, f"{name}.{factor_name}", number)

    def prune(self, factor, name, number):
        how, ratio = self.keys.get("reset_moments", "magnitude"), self.keys.get("prune_ratio", 0.9)
        if how == "zero":
            del self.optimizer.state[factor]
            return
        lots = torch.rand(factor.shape, generator=generator_for(SEED, f"{name}.moments:{number}"))
        state = self.optimizer.state[factor]
        for key in ("exp_avg", "exp_avg_sq"):
            scores = state[key].abs() if how == "magnitude" else lots
            threshold = scores.flatten().kthvalue(round(ratio * scores.numel())).values
            state[key][scores <= threshold] = 0
        state["exp_avg"][state["exp_avg_sq"] == 0] = 0


def loss_and_gradients(model, step):
    tokens = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(step))
    logits = model(tokens[:, :-1], torch.zeros(3, 7, dtype=torch.int32))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.item()


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"prune_ratio": 0.5},
        {"reset_moments": "random", "prune_ratio": 0.8},
        {"reset_moments": "zero"},
    ],
    ids=["magnitude", "magnitude-half", "random", "zero"],
)
def test_whole_model_follows_a_plain_reference_through_three_resets(keys):
    model, optimizer = build(relora(**keys))
    reference = Reference(keys)
    for step in range(NUM_STEPS):
        factor = 1 / (1 + step / 10)
        assert loss_and_gradients(model, step) == pytest.approx(
            loss_and_gradients(reference.model, step), abs=TOLERANCE
        ), step
        optimizer.set_lr(factor)
        optimizer.step()
        optimizer.zero_grad()
        reference.set_lr(step, factor)
        reference.finish(step)
        assert optimizer.metrics()["optimizer/lr"] == pytest.approx(
            reference.optimizer.param_groups[0]["lr"], rel=1e-12
        )
    assert optimizer.metrics()["reset/resets_total"] == 3
    for name, layer in low_rank_layers(model).items():
        theirs = reference.layers[name]
        for ours, other in (
            (layer.weight, theirs.W),
            (layer.lora_a, theirs.A),
            (layer.lora_b, theirs.B),
        ):
            torch.testing.assert_close(ours.detach(), other.detach(), rtol=0, atol=TOLERANCE)
        assert layer.lora_b.any(), "the last step is followed by no reset"


def train(model, optimizer, steps):
    for step in steps:
        loss_and_gradients(model, step)
        optimizer.set_lr(1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_a_reset_keeps_the_models_logits():
    model, optimizer = build(relora(), AdamWConfig(lr=2e-2))
    train(model, optimizer, range(INTERVAL - 1))
    tokens, documents = torch.arange(21).view(3, 7), torch.zeros(3, 7, dtype=torch.int32)
    before = model(tokens, documents).detach()
    dense_before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    loss_and_gradients(model, INTERVAL)
    optimizer.set_lr(0.0)  # an update that changes nothing, and a reset
    optimizer.step()
    assert optimizer.metrics()["reset/resets_total"] == 1
    after = model(tokens, documents).detach()
    # fp32 roundings of 6e-8 through two blocks, logits of order 1.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (model.model.layers[0].mlp.up_proj.weight - dense_before).abs().max() > 1e-3


def test_both_factors_of_every_layer_get_gradients_soon_after_a_reset():
    model, optimizer = build(relora())
    train(model, optimizer, range(INTERVAL))
    layers = low_rank_layers(model).values()
    assert not any(layer.lora_b.any() for layer in layers)
    loss_and_gradients(model, INTERVAL)
    assert all(layer.lora_b.grad.any() for layer in layers)
    # A's gradient goes through B, which is zero until this step's update.
    assert not any(layer.lora_a.grad.any() for layer in layers)
    train(model, optimizer, [INTERVAL])
    loss_and_gradients(model, INTERVAL + 1)
    assert all(layer.lora_a.grad.any() and layer.lora_b.grad.any() for layer in layers)


@pytest.mark.parametrize("reset_moments", ["magnitude", "random", "zero"])
def test_no_step_after_a_reset_is_out_of_proportion(reset_moments):
    model, optimizer = build(relora(reset_moments=reset_moments))
    train(model, optimizer, range(INTERVAL))
    for step in range(INTERVAL, 2 * INTERVAL - 1):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        train(model, optimizer, [step])
        for name, parameter in model.named_parameters():
            # Adam's bound on a step, (1 - beta1) / sqrt(1 - beta2), is below 1 with these betas.
            # Weight decay and a first moment from before the reset may add to it.
            assert (parameter - before[name]).abs().max() < 3 * ADAMW.lr, (name, step)


def test_only_the_factors_moments_are_pruned():
    model, optimizer = build(relora())
    train(model, optimizer, range(INTERVAL))
    state = optimizer.state_dict()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        num_values = parameter.numel()
        is_factor = name.endswith(("lora_a", "lora_b"))
        num_kept = num_values - round(0.9 * num_values) if is_factor else num_values
        seen = state[f"{name}.exp_avg_sq"]
        if name.endswith(
            "embed_tokens.weight"
        ):  # tokens that have not come up have moments of zero anyway
            assert seen.count_nonzero() > num_values / 2
        else:
            assert seen.count_nonzero() == num_kept, name
        assert state[f"{name}.step"] == INTERVAL


def test_a_reset_rounds_weights_in_bf16_by_the_seed():
    def weights_after_a_reset(seed):
        model = draw_model(relora())
        for name, layer in low_rank_layers(model).items():
            layer.weight.data = layer.weight.data.bfloat16()
            layer.lora_b.data.normal_(generator=generator_for(SEED, name))
        relora(seed=seed).build_optimizer(model, ADAMW, compile_step=False)._reset()
        return [layer.weight for layer in low_rank_layers(model).values()]

    first, again, other = (weights_after_a_reset(seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_a_warmup_as_long_as_the_interval_is_refused():
    ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=7)
    with pytest.raises(
        ValidationError, match="restart_warmup_steps = 8 is not below reset_interval = 8"
    ):
        ReloraConfig(rank=4, reset_interval=8, restart_warmup_steps=8)


def test_a_prune_ratio_that_would_have_no_effect_is_refused():
    ReloraConfig(rank=4, reset_interval=200, reset_moments="zero")
    with pytest.raises(ValidationError, match="prune_ratio has no effect"):
        ReloraConfig(rank=4, reset_interval=200, reset_moments="zero", prune_ratio=0.9)


@pytest.mark.parametrize("prune_ratio", [0.0, 1.0])
def test_pruning_nothing_or_everything_is_refused(prune_ratio):
    with pytest.raises(ValidationError, match="prune_ratio"):
        ReloraConfig(rank=4, reset_interval=200, prune_ratio=prune_ratio)


def test_an_interval_that_no_reset_would_come_within_is_refused():
    config = ReloraConfig(rank=4, reset_interval=200)
    assert config.check_length(201) == []
    (problem,) = config.check_length(200)
    assert problem.startswith(
        "[method] reset_interval = 200: expected less than [training] steps = 200"
    )
    assert 'name = "lora"' in problem
