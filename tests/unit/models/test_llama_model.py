"""The models equal those of transformers, and can be sharded."""

import copy

import pytest
import torch
import torch.distributed as dist
from support.small_llama import check_like_transformers, transformers_llama
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.fsdp import shard_model
from switchtitan.models import MODELS
from switchtitan.models.cola import ColaConfig
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.model import rotary_tables

VOCABULARY = 67
MULTI_HEAD = {
    "hidden_size": 30,
    "num_heads": 5,
    "intermediate_size": 41,
    "num_layers": 3,
    "vocab_size": VOCABULARY,
}
GROUPED = {**MULTI_HEAD, "hidden_size": 36, "num_heads": 6, "num_kv_heads": 2, "rope_theta": 700.0}


@torch.no_grad()
def build(**overrides):
    """A tiny model whose norm weights are not one, so that a missing norm is detected."""
    model = MODELS.build(LlamaConfig(size="9m", **{**MULTI_HEAD, **overrides}))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        center, spread = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.1)
        parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    return model


def draw_tokens(batch, seq, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (batch, seq), generator=generator)
    return tokens, torch.zeros(batch, seq, dtype=torch.int32)


@pytest.mark.parametrize("overrides", [MULTI_HEAD, GROUPED])
def test_logits_and_gradients_equal_those_of_transformers(overrides):
    model = build(**overrides)
    check_like_transformers(model, transformers_llama(model.config), draw_tokens(2, 17)[0])


def test_bf16_model_is_no_further_from_fp32_than_that_of_transformers():
    model = build(**GROUPED)
    tokens, document_ids = draw_tokens(3, 19)
    exact = model(tokens, document_ids)
    other = transformers_llama(model.config).bfloat16()
    other.load_state_dict(model.state_dict())
    logits = copy.deepcopy(model).bfloat16()(tokens, document_ids)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - exact).norm()
    other_error = (other(input_ids=tokens).logits.float() - exact).norm()
    assert error <= 1.1 * other_error  # norms round once here and twice there; 10 % for chance


@torch.no_grad()
def test_flex_keeps_documents_of_each_sequence_apart_and_sdpa_does_not():
    """The mask's function closes over the ids; compilation must not keep those of the first."""
    flex, sdpa = (build(**GROUPED | {"num_layers": 1}, attention=name) for name in ("flex", "sdpa"))
    tokens, document_ids = draw_tokens(2, 12)
    for lengths in ([5, 7], [12]), ([3, 6, 3], [4, 8]):
        apart = []
        for row, of_row in enumerate(lengths):
            document_ids[row] = torch.arange(len(of_row)).repeat_interleave(torch.tensor(of_row))
            parts = tokens[row : row + 1].split(of_row, dim=1)
            apart.append(torch.cat([sdpa(part, document_ids) for part in parts], dim=1))
        # Only differences of rotary positions matter: fp32 roundings of logits of order 1.
        torch.testing.assert_close(flex(tokens, document_ids), torch.cat(apart), atol=1e-5, rtol=0)
        assert (sdpa(tokens, document_ids) - torch.cat(apart))[0, lengths[0][0] :].abs().min() > 0


def test_sharding_in_bf16_leaves_rotary_tables_in_fp32():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, seen = build(), []
    for block in model.blocks().values():
        block.self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    shard_model(model, init_device_mesh("cpu", (1,)), torch.bfloat16, ParallelismConfig())
    logits = model(*draw_tokens(1, 7))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    expected, _ = rotary_tables(model.config, 7, torch.device("cpu"))
    assert [torch.equal(positions.cos, expected) for positions in seen] == [True] * 3


def test_initial_values_have_the_configured_distribution():
    model = build(init_std=0.05)

    def draw(name, shape):
        return model.initial_value(name, torch.Size(shape), torch.Generator().manual_seed(7))

    drawn = draw("model.layers.1.mlp.up_proj.weight", (301, 203))
    assert (drawn.dtype, drawn.device.type) == (torch.float32, "cpu")
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 * 0.05 / count**0.5  # five standard errors
    assert drawn.std() == pytest.approx(0.05, rel=5 / (2 * count) ** 0.5)
    for name, parameter in model.named_parameters():
        assert bool((draw(name, parameter.shape) == 1).all()) == ("norm" in name), name


def test_initial_values_of_wider_models_are_smaller_by_class():
    plain, wider = build(init_std=0.05), build(init_std=0.05, tuned_hidden_size=6)
    ratio = 6 / plain.config.sizes.hidden_size
    factors = {"model.embed_tokens": 1.0, "model.layers.1.mlp.down_proj": ratio**0.5}
    for layer, factor in {**factors, "lm_head": ratio}.items():
        first, second = (
            model.initial_value(f"{layer}.weight", (9, 7), torch.Generator().manual_seed(3))
            for model in (plain, wider)
        )
        torch.testing.assert_close(second, factor * first)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GROUPED),
        LlamaConfig(**GROUPED, tied_head=True, head_dim=4),
        ColaConfig(**GROUPED, rank=5),
    ],
)
def test_flops_per_token_are_three_times_those_of_a_forward_pass(config):
    """torch's counter on a forward pass; a backward pass costs twice as much."""
    model, (batch, seq) = MODELS.build(config), (2, 16)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, math:
        model(*draw_tokens(batch, seq))
    assert model.num_flops_per_token(seq) * batch * seq == 3 * counter.get_total_flops()
