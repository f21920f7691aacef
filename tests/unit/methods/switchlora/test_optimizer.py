"""The optimizer equals a literal re-implementation, on a LLaMA in float64."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.switchlora_layers import with_interval
from support.switchlora_reference import ReferenceLayer, ReferenceSwitchLora, constant_candidates

from switchtitan.contracts import Reparametrized
from switchtitan.distributed.seeds import generator_for
from switchtitan.methods.lowrank import low_rank_layers
from switchtitan.methods.switchlora import SwitchLora, SwitchLoraConfig
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.optim import AdamWConfig

SEED, NUM_STEPS, VOCABULARY = 3, 60, 29
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
RANK = 5  # k_proj and v_proj are [6, 12]: one candidate on each side waits, so their limit is felt
ADAMW = AdamWConfig(lr=3e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, decay_norms=True)
TOLERANCE = 1e-9  # float64 rounds at 1e-16; sixty steps of Adam with eps 1e-6 amplify by up to 1e5


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw_model(method=None):
    """The model with random values drawn in float64."""
    model = MODELS.build(MODEL)
    plain = {
        name: model.initial_value(name, p.shape, generator_for(SEED, name)).double()
        for name, p in model.named_parameters()
    }
    if method is not None:
        method.prepare_model(model)
    with torch.no_grad():
        for prefix, module in model.named_modules():
            own = dict(module.named_parameters(recurse=False)) | dict(
                module.named_buffers(recurse=False)
            )
            values = {name: plain.get(f"{prefix}.{name}") for name in own}
            if isinstance(module, Reparametrized):
                values = module.initial_tensors(
                    values["weight"],
                    lambda name, prefix=prefix: generator_for(SEED, f"{prefix}.{name}"),
                )
            for name, tensor in own.items():
                tensor.copy_(values[name])
    return model


def build_ours(config, num_steps=NUM_STEPS, compile_step=False):
    method = SwitchLora(config, num_steps, seed=SEED)
    model = draw_model(method)
    return model, method.build_optimizer(model, ADAMW, compile_step)


def initial_candidates(config, name, layer):
    """Candidates [c, in] of A and [out, c] of B: the layer's if stored, recomputed if constant."""
    if config.candidates == "swap":
        return layer.candidates_a, layer.candidates_b.T
    out_features, in_features = layer.weight.shape
    std_a = (RANK * out_features**0.5 / in_features**1.5) ** 0.25 * 3**-0.25
    std_b = (RANK / (out_features * in_features) ** 0.5) ** 0.25 * 3**-0.25
    bounds = (
        (3**0.5 * std_a, 3**0.5 * std_b)
        if config.init == "switchlora"
        else (in_features**-0.5, 0.0)
    )
    count = min(layer.weight.shape)
    candidates_a = constant_candidates(SEED, f"{name}.candidates_a", count, in_features, bounds[0])
    candidates_b = constant_candidates(
        SEED, f"{name}.candidates_b", count, out_features, bounds[1]
    ).T
    return candidates_a.double(), candidates_b.double()


def build_reference(config, rates):
    """Use the same initial candidates; compute their selection and W independently."""
    model, drawn = draw_model(), low_rank_layers(build_ours(config)[0])
    layers = {}
    for name, ours in drawn.items():
        parent, _, local_name = name.rpartition(".")
        weight = model.get_submodule(name).weight.detach().clone()
        candidates_a, candidates_b = initial_candidates(config, name, ours)
        layers[name] = ReferenceLayer(
            weight,
            candidates_a,
            candidates_b,
            config.rank,
            config.alpha / config.rank,
            puts_back=config.candidates == "swap",
            resets=config.reset_moments,
        )
        setattr(model.get_submodule(parent), local_name, layers[name])
    factors = {id(factor) for layer in layers.values() for factor in (layer.A, layer.B)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in factors]
    optimizer = ReferenceSwitchLora(
        list(layers.values()),
        others,
        rates=rates,
        interval=config.interval,
        freeze_steps=config.freeze_steps,
        lr=ADAMW.lr,
        betas=ADAMW.betas,
        eps=ADAMW.eps,
        weight_decay=ADAMW.weight_decay,
    )
    return model, layers, optimizer


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (3, 8), generator=generator)


def run_step(model, optimizer, step):
    """Train one step on its own batch; return the loss."""
    tokens = batch(step)
    logits = model(tokens[:, :-1], torch.zeros(3, 7, dtype=torch.int32))
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return loss.item()


def reference_tensors(layer):
    factors = {"weight": layer.W, "lora_a": layer.A, "lora_b": layer.B.T}
    if not layer.puts_back:
        return factors
    return factors | {"candidates_a": layer.candidates_a, "candidates_b": layer.candidates_b.T}


def reference_rates(config):
    """The formulas of the three decays, step by step."""
    horizon = config.decay_ratio * NUM_STEPS
    rate = {
        "exponential": lambda t: 0.3 ** ((t + 1) / horizon),
        "sigmoid": lambda t: 1 - 1 / (1 + math.exp(-10 * (t / horizon - 1))),
        "constant": lambda t: 1.0,
    }[config.decay]
    return [rate(t) for t in range(NUM_STEPS)]


BALANCED = {
    "decay": "exponential",
    "decay_ratio": 0.9,
    "interval": 4.3,
    "freeze_steps": 2,
    "alpha": 2.5,
}


@pytest.mark.parametrize(
    "keys",
    [
        BALANCED,
        {
            "decay": "exponential",
            "decay_ratio": 0.5,
            "interval": 10.7,
            "freeze_steps": 5,
            "init": "lora",
        },
        # k_proj and v_proj go round their six candidates several times.
        {
            "decay": "constant",
            "interval": 6.1,
            "freeze_steps": 0,
            "reset_moments": "none",
            "alpha": 2.5,
        },
        {
            "decay": "sigmoid",
            "decay_ratio": 0.6,
            "interval": 6.1,
            "freeze_steps": 3,
            "reset_moments": "both",
        },
        {"decay": "constant", "interval": 6.1, "freeze_steps": 0, "reset_moments": "momentum"},
        {"decay": "constant", "interval": 6.1, "freeze_steps": 2, "reset_moments": "momentum"},
        {"decay": "constant", "interval": 6.1, "freeze_steps": 0, "reset_moments": "rescaled"},
        # B and its candidates are zero: a norm of zero resets.
        {
            "decay": "constant",
            "interval": 6.1,
            "freeze_steps": 2,
            "init": "lora",
            "reset_moments": "rescaled",
        },
        {
            "candidates": "constant",
            "decay": "constant",
            "interval": 4.3,
            "freeze_steps": 2,
            "alpha": 2.5,
        },
        {
            "candidates": "constant",
            "decay": "sigmoid",
            "interval": 5,
            "freeze_steps": 1,
            "decay_ratio": 0.9,
            "init": "lora",
            "reset_moments": "both",
        },
    ],
    ids=[
        "balanced",
        "lora",
        "no-reset",
        "reset-both",
        "momentum",
        "momentum-freeze",
        "rescaled",
        "rescaled-lora",
        "constant",
        "constant-lora",
    ],
)
def test_whole_model_follows_the_rules_written_out_vector_by_vector(keys):
    check_whole_run(with_interval(rank=RANK, **keys), compile_step=False)


def test_compiled_updates_follow_them_too():
    torch._dynamo.reset()
    check_whole_run(with_interval(rank=RANK, **BALANCED), compile_step=True)
    torch._dynamo.reset()


def test_switches_with_rescaled_moments_recompile_nothing():
    torch._dynamo.reset()
    config = SwitchLoraConfig(
        rank=RANK, decay="constant", interval=6.1, freeze_steps=2, reset_moments="rescaled"
    )
    model, optimizer = build_ours(config, compile_step=True)
    run_step(model, optimizer, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(1, 20):
            run_step(model, optimizer, step)
    assert optimizer.metrics()["switch/vectors_switched_total"] > 100
    torch._dynamo.reset()


def test_a_second_moment_that_is_not_rescaled_is_found():
    config = SwitchLoraConfig(
        rank=RANK, decay="constant", interval=6.1, freeze_steps=0, reset_moments="rescaled"
    )
    other = config.model_copy(update={"reset_moments": "momentum"})
    with pytest.raises(AssertionError, match="step 1: Tensor-likes are not close"):
        check_whole_run(config, compile_step=False, rules=other)


def check_whole_run(config, compile_step, rules=None):
    """Switches, freezing and weight decay together, every tensor after every step.

    Args:
        rules: the configuration of the reference; by default `config`.
    """
    ours, optimizer = build_ours(config, compile_step=compile_step)
    theirs, their_layers, reference = build_reference(rules or config, reference_rates(config))
    for step in range(NUM_STEPS):
        assert run_step(ours, optimizer, step) == pytest.approx(
            run_step(theirs, reference, step), abs=TOLERANCE
        )
        state = optimizer.state_dict()
        assert state["switch.num_switched"].tolist() == reference.num_switched
        for index, (name, layer) in enumerate(low_rank_layers(ours).items()):
            other = their_layers[name]
            assert state["switch.freeze_steps_left"][:, index].tolist() == [
                other.rest_a,
                other.rest_b,
            ]
            assert state["switch.vector_steps"][:, index].tolist() == [other.steps_a, other.steps_b]
            pairs = {
                key: (getattr(layer, key), value) for key, value in reference_tensors(other).items()
            }
            for factor, moments in (
                ("lora_a", other.moments_a),
                ("lora_b", [moment.T for moment in other.moments_b]),
            ):
                for key, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                    pairs[f"{factor}.{key}"] = state[f"{name}.{factor}.{key}"], value
            for key, (mine, expected) in pairs.items():
                torch.testing.assert_close(
                    mine,
                    expected,
                    rtol=0,
                    atol=TOLERANCE,
                    msg=partial("{}.{}, step {}: {}".format, name, key, step),
                )
        check_metrics(optimizer, reference)
    for name, parameter in theirs.named_parameters():
        if not name.endswith((".A", ".B")):
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=TOLERANCE)
    assert min(reference.num_switched) > 2, "too few switches to test anything"


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


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        # k_proj has one candidate that is not in use.
        ({"interval": 5, "freeze_steps": 0}, None),
        (
            {"interval": 4, "freeze_steps": 0},
            "[method] interval = 4: 1.25 switches of each factor's vectors are due in a step at "
            "the start, but model.layers.0.self_attn.k_proj has 6 candidates for rank = 5, so at "
            "most 1 are made there and the others are dropped; increase it, or lower rank",
        ),
        ({"switches_per_vector": 12, "freeze_steps": 0}, None),
        ({"switches_per_vector": 15, "freeze_steps": 0}, "switches_per_vector = 15: 1.25 switches"),
    ],
)
def test_switches_that_a_layer_has_too_few_candidates_for_are_said(caplog, keys, warning):
    config = SwitchLoraConfig(rank=RANK, decay="constant", **keys)
    _, optimizer = build_ours(config)
    if warning is None:
        assert not caplog.text
    else:
        assert warning in caplog.text
    requested = sum(optimizer._schedule.requested(step) for step in range(NUM_STEPS))
    for _ in range(NUM_STEPS):
        optimizer.switch()
    assert (optimizer._counts.num_switched < requested).any() == (warning is not None)


def test_metric_of_the_last_step_is_the_growth_of_the_total():
    model, optimizer = build_ours(
        SwitchLoraConfig(rank=RANK, interval=6, freeze_steps=2, decay="constant")
    )
    totals = [0.0]
    for step in range(9):
        run_step(model, optimizer, step)
        metrics = optimizer.metrics()
        totals.append(metrics["switch/vectors_switched_total"])
        assert metrics["switch/vectors_switched"] == totals[-1] - totals[-2]
        assert metrics["optimizer/lr"] == ADAMW.lr
    assert totals[-1] > 0


@pytest.mark.parametrize("candidates", ["swap", "constant"])
def test_run_resumes_bitwise_from_its_state(candidates):
    config = with_interval(6.5, rank=RANK, freeze_steps=3, decay="constant", candidates=candidates)
    model, optimizer = build_ours(config)
    for step in range(17):
        run_step(model, optimizer, step)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert state["switch.freeze_steps_left"].any(), (
        "nothing is frozen: that part of the state is not tested"
    )

    other, resumed = build_ours(config)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(17, 29):
        assert run_step(other, resumed, step) == run_step(model, optimizer, step)
    for tensors, expected in (
        (other.state_dict(), model.state_dict()),
        (resumed.state_dict(), optimizer.state_dict()),
    ):
        assert tensors.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


def test_zero_grad_forgets_all_gradients():
    model, optimizer = build_ours(SwitchLoraConfig(rank=RANK))
    tokens = batch(0)
    model(tokens, torch.zeros_like(tokens, dtype=torch.int32)).sum().backward()
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("candidates", ["swap", "constant"])
def test_model_starts_as_the_plain_model(candidates):
    tokens = batch(0)
    documents = torch.zeros_like(tokens, dtype=torch.int32)
    model, _ = build_ours(SwitchLoraConfig(rank=RANK, alpha=3, candidates=candidates))
    # float64 rounding through two blocks
    torch.testing.assert_close(
        model(tokens, documents), draw_model()(tokens, documents), rtol=0, atol=1e-12
    )
