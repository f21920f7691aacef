"""A method applied to any module: what it computes, trains and leaves behind."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.checkpoints import refused
from support.loops import (
    NUM_STEPS,
    SWITCHING,
    build_llama,
    draw_tokens,
    loss_of,
    run_loop,
    start_loop,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from switchtitan import apply
from switchtitan.errors import ConfigError

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}
PROJECTING = {"rank": 4, "update_interval": 50}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def build_vit():
    sizes = {key: size for key, size in SIZES.items() if key != "vocab_size"}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3, hidden_dropout_prob=0.0)
    )


def build_tied():
    return build_llama(tie_word_embeddings=True)


def build_frozen_embedding():
    model = build_llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


class Plain(nn.Module):
    """Blocks in an `nn.Sequential`, whose second layer gets no gradient while it is off."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(2)))
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.is_on = nn.Linear(12, 16), nn.Linear(16, 12), True

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x))) if self.is_on else x


MODELS = {
    "llama": (build_llama, 14),
    "tied head": (build_tied, 14),
    "frozen embedding": (build_frozen_embedding, 14),
    "biases": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1)), 14),
    "bert": (lambda: BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0)), 12),
    "vit": (build_vit, 12),
    "plain": (Plain, 4),
    "list of layers": (lambda: nn.Sequential(*(nn.Linear(12, 12) for _ in range(3))), 3),
}


def logits_of(model):
    inputs = next(p for n, p in model.named_parameters() if "weight" in n)
    if not hasattr(model, "config"):
        return model(torch.randn(4, 12, generator=torch.Generator().manual_seed(2)).to(inputs))
    return model(IMAGES if isinstance(model, ViTForImageClassification) else draw_tokens(9)).logits


def train(model, optimizer, num_steps=4):
    losses = []
    for _ in range(num_steps):
        logits = logits_of(model).flatten(0, -2)
        loss = F.cross_entropy(logits, torch.arange(len(logits)) % 3)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_computes_the_same_trains_and_becomes_plain_again(kind):
    torch.manual_seed(0)
    build, num_layers = MODELS[kind]
    model = build().eval()
    plain, before = copy.deepcopy(model), logits_of(model).detach()
    given = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    random_state = torch.get_rng_state()
    method = apply(model, **SWITCHING)
    assert torch.equal(torch.get_rng_state(), random_state)
    kept = {name: p.data_ptr() for name, p in model.named_parameters() if name in given}
    assert kept == given
    assert len(method.layers) == num_layers
    # W - s B A is rounded once, in fp32.
    torch.testing.assert_close(logits_of(model), before, atol=1e-5, rtol=1e-5)
    optimizer = method.optimizer(lr=1e-2)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    trained, dense = logits_of(model).detach(), method.dense_state_dict()
    plain.load_state_dict(dense)
    method.merge()
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    for other in (plain, model):
        torch.testing.assert_close(logits_of(other), trained, atol=1e-5, rtol=1e-5)


def test_a_model_on_meta_starts_as_one_with_weights():
    expected, _, optimizer = start_loop()
    losses = run_loop(expected, optimizer, range(4))
    with torch.device("meta"):
        model = build_llama()
    method = apply(model, **SWITCHING)
    with pytest.raises(ConfigError, match="initialize"):
        method.optimizer(lr=1e-2)
    model.to_empty(device="cpu")
    given = build_llama()
    model.load_state_dict(given.state_dict(), strict=False)
    for name, buffer in given.named_buffers():  # rotary frequencies, which no checkpoint has
        model.get_buffer(name).copy_(buffer)
    method.initialize()
    method.initialize()  # starts what has not started
    optimizer = method.optimizer(lr=1e-2, betas=(0.9, 0.95))
    assert run_loop(model, optimizer, range(4)) == losses


def test_layers_that_were_frozen_before_are_left_alone_and_not_frozen_later():
    model = Plain()
    model.blocks[0].requires_grad_(False)
    method = apply(model, **SWITCHING)
    assert list(method.layers) == ["blocks.1.up", "blocks.1.down"]
    model.blocks[1].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"blocks\.1\.up: its factors are frozen"):
        method.optimizer(lr=1e-2)


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")])
def test_names_are_those_without_wrappers_around_blocks(wrap):
    torch.manual_seed(0)
    plain, model = Plain(), Plain()
    model.load_state_dict(plain.state_dict())
    names = list(plain.state_dict())
    method, expected = apply(model, **SWITCHING), apply(plain, **SWITCHING)
    model.blocks = nn.Sequential(wrap(model.blocks[0]), model.blocks[1])
    optimizer = method.optimizer(lr=1e-2)
    assert train(model, optimizer) == train(plain, expected.optimizer(lr=1e-2))
    assert list(method.dense_state_dict()) == names
    assert not [module for module in method.merge().modules() if hasattr(module, "lora_a")]


def test_a_bf16_model_trains_with_fp32_factors():
    model, method, optimizer = start_loop(build_llama().to(torch.bfloat16))
    dtypes = {(p.dtype, p.requires_grad) for n, p in model.named_parameters() if "_proj" in n}
    assert dtypes == {(torch.float32, True), (torch.bfloat16, False)}
    losses = run_loop(model, optimizer, range(9))
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in method.dense_state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("full_rank", {}),
        ("lora", {"rank": 4, "init": "balanced", "alpha": 1}),
        ("relora", {"rank": 4, "reset_interval": 3, "restart_warmup_steps": 1}),
        *((name, PROJECTING) for name in ("galore", "fira", "apollo")),
    ],
)
def test_rates_of_groups_decide_for_every_method(name, keys):
    model, method, optimizer = start_loop(build_llama(), name, num_steps=NUM_STEPS, **keys)
    losses = run_loop(model, optimizer, range(7))
    assert losses[-1] < losses[0]
    before = method.dense_state_dict()
    before = {key: tensor.clone() for key, tensor in before.items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run_loop(model, optimizer, [7])
    after = method.dense_state_dict()
    # A reset moves B A into W, which rounds.
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


@pytest.mark.parametrize(
    ("name", "keys", "optimizer_name"),
    [
        ("switchlora", SWITCHING | {"interval": 1e6}, "adamw"),
        ("switchlora", SWITCHING | {"interval": 1e6}, "muon"),
        ("full_rank", {}, "muon"),
        *((name, PROJECTING, "adamw") for name in ("galore", "fira", "apollo")),
    ],
)
def test_without_a_gradient_nothing_of_a_parameter_changes(name, keys, optimizer_name):
    """In the first steps too, after which a basis must be that of a gradient."""
    torch.manual_seed(0)
    model = Plain()
    method = apply(model, name, **({"num_steps": NUM_STEPS} | keys))
    optimizer = method.optimizer(optimizer_name, lr=1e-2, weight_decay=0.1)

    def tensors_of(block):
        state = {
            f"{index}.{key}": value
            for index, parameter in enumerate(block.parameters())
            for key, value in optimizer.state[parameter].items()
        }
        state |= dict(block.named_parameters())
        return {key: tensor.detach().clone() for key, tensor in state.items()}

    def moved(block, old):
        return [
            not torch.equal(parameter, old[key])
            for key, parameter in block.named_parameters()
            if parameter.requires_grad
        ]

    on, off = model.blocks
    for _ in range(2):
        off.is_on = False
        before, before_on = tensors_of(off), tensors_of(on)
        train(model, optimizer, 3)
        after = tensors_of(off)
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        assert all(moved(on, before_on))
        off.is_on = True
        train(model, optimizer, 1)
        assert all(moved(off, before))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(24, 24))])
        self.again = self.blocks[0]


def build_applied():
    return start_loop()[0]


def build_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    )


def build_encoder():
    layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


PRODUCT = {"num_steps": 10, "rank": 4}
PLAIN = {"name": "full_rank", "num_steps": 9}


@pytest.mark.parametrize(
    ("build", "keys", "fragments"),
    [
        (build_llama, {"rank": 32}, ["[method] rank = 32", "q_proj"]),
        (build_llama, {"rnk": 4}, ["rnk = 4: unknown key"]),
        (build_llama, {"num_steps": "9"}, ["num_steps = '9'"]),
        (build_applied, {}, ["merge it first"]),
        (build_llama, {"targets": ["query"]}, ["'query'", "q_proj"]),
        (build_llama, {"interval": 1.0}, ["[method] interval = 1"]),
        (build_llama, {"candidates_device": "host"}, ["host memory"]),
        (build_tied, {"targets": ["lm_head"]}, ["lm_head", "tied"]),
        (build_gpt2, {}, ["Conv1D", "none"]),
        (build_encoder, {}, ["nn.TransformerEncoderLayer"]),
        (Shared, {"targets": ["0.0"]}, ["blocks.0.0"]),
        (lambda: nn.Sequential(nn.Linear(8, 8)), {}, ["targets", "0"]),
        (lambda: build_llama().double(), {}, ["torch.float64"]),
        (lambda: torch.compile(build_llama()), {}, ["apply first"]),
        (lambda: nn.Linear(8, 8), {"name": "galore", **PRODUCT}, ["targets: missing"]),
        (build_llama, {"name": "low_rank", **PRODUCT}, ["low_rank", "computes"]),
        (build_llama, {"name": "sltrain", **PRODUCT}, ["sltrain", "computes"]),
        # By `optimizer`.
        (build_llama, {"optimizer": "sgd"}, ["sgd", "adamw or"]),
        (build_llama, {"optimizer": "adam"}, ["adam", "expected one of"]),
        (build_llama, {"optimizer": [{"params": []}]}, ["expected a name"]),
        (lambda: nn.Linear(8, 8), {"optimizer": "muon", **PLAIN}, ["ModuleList"]),
        (lambda: nn.Linear(8, 8), {"optimizer": "scale", **PLAIN}, ["head"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(build, keys, fragments):
    model, keys = build(), keys if "name" in keys else SWITCHING | keys
    types = [type(module) for module in model.modules()]
    with refused(*fragments, error=ConfigError) as raised:
        method = apply(model, **{key: value for key, value in keys.items() if key != "optimizer"})
        types = [type(module) for module in model.modules()]
        method.optimizer(keys["optimizer"], lr=1.0)
    assert "\n" not in str(raised.value)
    assert [type(module) for module in model.modules()] == types


def test_rates_of_another_width_are_scaled_if_the_model_names_its_head():
    _, method, _ = start_loop()
    groups = method.optimizer("muon", lr=4e-2, other_lr=1e-2, tuned_hidden_size=8).param_groups
    assert sorted(group["lr"] for group in groups) == [1e-2 * 8 / 32, 1e-2, 4e-2]
    for build in (build_tied, Plain):
        plain = apply(build(), "full_rank", num_steps=9)
        with pytest.raises(ConfigError, match=r"tuned_hidden_size = 8: .*head is tied or a target"):
            plain.optimizer(lr=1.0, tuned_hidden_size=8)


def test_a_method_ends_with_merge_and_needs_its_own_optimizer(caplog):
    model, method, optimizer = start_loop()
    loss_of(model, draw_tokens(0)).backward()
    method.merge()
    for call in (optimizer.step, lambda: method.optimizer(lr=1e-2)):
        with pytest.raises(ConfigError, match="merged"):
            call()
    assert not caplog.records
    apply(build_llama(), **SWITCHING).merge()
    assert "was not called" in caplog.text


def test_factors_stay_in_fp32_and_frozen_weights_out_of_the_groups():
    model = build_llama()
    method = apply(model, **SWITCHING)
    optimizer = method.optimizer(lr=1e-2)
    model.requires_grad_(True).bfloat16()
    loss_of(model, draw_tokens(0)).backward()
    with pytest.raises(ConfigError, match=r"torch\.bfloat16"):
        optimizer.step()
    with pytest.raises(ConfigError, match=r"tokens.weight is torch\.bfloat16: muon8bit"):
        apply(build_llama().bfloat16(), **SWITCHING).optimizer("muon8bit", lr=1e-2)
    model = build_llama()
    method = apply(model, **SWITCHING)
    model.requires_grad_(True)
    trained = [p for group in method.optimizer(lr=1e-2).param_groups for p in group["params"]]
    assert not {id(layer.weight) for layer in method.layers.values()} & {*map(id, trained)}


@pytest.mark.parametrize("keys", [{}, {"contraction": "merged"}, {"dropout": 1e-9}])
def test_a_layer_computes_in_the_dtype_of_autocast(keys):
    _, method, _ = start_loop(**keys)
    layer = method.layers["model.layers.0.mlp.up_proj"]
    dense = layer.weight + layer.scale * layer.lora_b.t() @ layer.lora_a
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = layer(x), F.linear(x, dense)
    assert out.dtype == expected.dtype == torch.bfloat16
    # bf16 has 8 bits, and W and s B A cancel in part.
    torch.testing.assert_close(out, expected, atol=0.03, rtol=0)
    out.sum().backward()
    assert layer.lora_a.grad.dtype == x.grad.dtype == torch.float32
