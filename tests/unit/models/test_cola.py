"""CoLA equals transformers' LLaMA with B silu(A x) in place of every linear layer of the blocks."""

import math

import pytest
import torch
from pydantic import ValidationError
from support.small_llama import MODEL, check_like_transformers, transformers_llama
from torch import nn

from switchtitan.distributed.fsdp import materialize
from switchtitan.methods.targets import linear_layers
from switchtitan.models import MODELS
from switchtitan.models.cola import ColaConfig
from switchtitan.models.llama.config import LlamaConfig

KEYS = MODEL.model_dump(exclude={"name", "size"})
RANK = 5
TOKENS = torch.arange(2 * 13).reshape(2, 13) * 7 % KEYS["vocab_size"]


def transformers_model(activation):
    """LLaMA of transformers, each of whose linear layers is two, with a function between them."""
    other = transformers_llama(ColaConfig(**KEYS, rank=RANK))
    for block in other.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    first = nn.Linear(linear.in_features, RANK, bias=False)
                    second = nn.Linear(RANK, linear.out_features, bias=False)
                    setattr(part, name, nn.Sequential(first, activation(), second))
    return other


@pytest.mark.parametrize(("activation", "function"), [("silu", nn.SiLU), ("none", nn.Identity)])
def test_logits_and_gradients_equal_those_of_transformers_layers(activation, function):
    torch.manual_seed(0)
    ours = MODELS.build(ColaConfig(**KEYS, rank=RANK, activation=activation))
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)

    def renamed(name):
        return name.replace(".factor_a.", ".0.").replace(".factor_b.", ".2.")

    check_like_transformers(ours, transformers_model(function), TOKENS, renamed)


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_outputs_start_with_the_mean_square_of_llamas(activation):
    shapes = {"hidden_size": 512, "num_heads": 8, "intermediate_size": 768, "num_layers": 1}
    shapes["vocab_size"] = 11
    plain, cola = LlamaConfig(**shapes), ColaConfig(**shapes, rank=96, activation=activation)
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(1))
    spreads = {}
    for config in (plain, cola):
        with torch.device("meta"):
            model = MODELS.build(config)
        materialize(model, torch.device("cpu"), 2)
        gate = model.get_submodule("model.layers.0.mlp.gate_proj")
        spreads[config.name] = gate(x).square().mean().sqrt().item()
    assert spreads["llama"] == pytest.approx(plain.init_std * math.sqrt(512), rel=0.02)
    assert spreads["cola"] == pytest.approx(spreads["llama"], rel=0.05)


def test_a_rank_must_be_below_every_width():
    # A head of keys and values has 6 features.
    with pytest.raises(ValidationError, match=r"rank = 6.*num_kv_heads"):
        ColaConfig(**KEYS, rank=6)


def test_lr_is_the_rate_of_both_factors():
    model = MODELS.build(ColaConfig(**KEYS, rank=RANK))
    factors = [name for name, _ in model.named_modules() if ".factor_" in name]
    assert list(linear_layers(model)) == factors
    assert len(factors) == 2 * 7 * KEYS["num_layers"]
