"""The model equals Hugging Face's LLaMA and fulfils `contracts.LanguageModel`."""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig as HuggingFaceConfig
from transformers import LlamaForCausalLM

from switchtitan.contracts import LanguageModel
from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.fsdp import shard_model
from switchtitan.models import MODELS
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.model import Llama, Positions
from switchtitan.models.llama.rope import rotary_tables

MULTI_HEAD = {
    "hidden_size": 30,
    "num_heads": 5,
    "intermediate_size": 41,
    "num_layers": 3,
    "vocab_size": 67,
}
GROUPED = {**MULTI_HEAD, "hidden_size": 36, "num_heads": 6, "num_kv_heads": 2, "rope_theta": 700.0}


def build(**overrides: Any) -> Llama:
    """A tiny model whose norm weights are not one, so that a missing norm is detected."""
    model = MODELS.build(LlamaConfig(size="9m", **{**MULTI_HEAD, **overrides}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if name.endswith("norm.weight") else 0.1
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + spread * torch.randn(parameter.shape, generator=generator))
    return model


def build_huggingface(model: Llama, **settings: Any) -> LlamaForCausalLM:
    """The same model with the same weights; loading is strict, so names are equal."""
    dims = model.dims
    config = HuggingFaceConfig(
        hidden_size=dims.hidden_size,
        intermediate_size=dims.intermediate_size,
        num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        vocab_size=dims.vocab_size,
        rms_norm_eps=dims.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": dims.rope.theta},
        tie_word_embeddings=False,
        **settings,
    )
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=True)
    return other


def draw_tokens(batch: int, seq: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(
        0, MULTI_HEAD["vocab_size"], (batch, seq), generator=torch.Generator().manual_seed(seed)
    )
    return tokens, torch.zeros(batch, seq, dtype=torch.int32)


@pytest.mark.parametrize("overrides", [MULTI_HEAD, GROUPED])
def test_logits_and_gradients_equal_hugging_faces(overrides: dict) -> None:
    model = build(**overrides)
    other = build_huggingface(model)
    tokens, document_ids = draw_tokens(2, 17)
    logits, other_logits = model(tokens, document_ids), other(input_ids=tokens).logits
    torch.testing.assert_close(logits, other_logits, atol=1e-5, rtol=0)

    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * direction).sum().backward()
    (other_logits * direction).sum().backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        error = (parameter.grad - expected).norm() / expected.norm()
        assert error < 1e-5, name  # fp32 rounding; sums run in another order


def test_bf16_model_is_no_further_from_fp32_than_hugging_faces() -> None:
    model = build(**GROUPED)
    tokens, document_ids = draw_tokens(3, 19)
    exact = model(tokens, document_ids)
    other = build_huggingface(model).bfloat16()
    logits = copy.deepcopy(model).bfloat16()(tokens, document_ids)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - exact).norm()
    other_error = (other(input_ids=tokens).logits.float() - exact).norm()
    assert error <= 1.1 * other_error  # norms round once here and twice there; 10 % for chance


def test_a_later_token_never_changes_earlier_logits() -> None:
    model = build()
    tokens, document_ids = draw_tokens(1, 11)
    before = model(tokens, document_ids)
    for position in (3, 10):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % MULTI_HEAD["vocab_size"]
        after = model(changed, document_ids)
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=0)
        assert (after[:, position:] - before[:, position:]).abs().amax(-1).min() > 1e-4


def test_flex_keeps_documents_apart_and_sdpa_does_not() -> None:
    flex, sdpa = build(attention="flex"), build(attention="sdpa")
    tokens, document_ids = draw_tokens(1, 12)
    document_ids[:, 5:] = 1
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % MULTI_HEAD["vocab_size"]
    with torch.no_grad():
        moved = {
            name: (model(changed, document_ids) - model(tokens, document_ids)).abs().amax((0, 2))
            for name, model in (("flex", flex), ("sdpa", sdpa))
        }
        one_document = flex(tokens, torch.zeros_like(document_ids))
    assert moved["flex"][2:5].min() > 1e-4
    assert moved["flex"][5:].max() == 0
    assert moved["sdpa"][5:].min() > 1e-4
    torch.testing.assert_close(one_document, sdpa(tokens, document_ids), atol=1e-5, rtol=0)


class Doubled(nn.Module):
    """Replaces a linear layer, as methods do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, features: Tensor) -> Tensor:
        return 2.0 * nn.functional.linear(features, self.weight)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_blocks_compile_without_breaks_also_with_replaced_layers(backend: str) -> None:
    model = build(**{**GROUPED, "num_layers": 2})
    for block in model.blocks().values():
        block.self_attn.q_proj = Doubled(block.self_attn.q_proj)
        block.mlp.down_proj = Doubled(block.mlp.down_proj)
    tokens, document_ids = draw_tokens(2, 9)
    expected = model(tokens, document_ids)
    for block in model.blocks().values():
        block.compile(fullgraph=True, backend=backend)
    torch.testing.assert_close(model(tokens, document_ids), expected, atol=1e-5, rtol=0)


def test_blocks_compile_once_for_all_forwards() -> None:
    torch._dynamo.reset()
    counters.clear()
    model = build()
    for block in model.blocks().values():
        block.compile(fullgraph=True, backend="aot_eager")
    model(*draw_tokens(2, 9, seed=0)).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            model(*draw_tokens(2, 9, seed=seed)).sum().backward()
    assert not counters["graph_break"]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_sharding_in_bf16_leaves_rotary_tables_in_fp32() -> None:
    model = build()
    seen: list[Positions] = []
    for block in model.blocks().values():
        block.self_attn.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    shard_model(model, init_device_mesh("cpu", (1,)), torch.bfloat16, ParallelismConfig())
    logits = model(*draw_tokens(1, 7))
    logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    expected, _ = rotary_tables(7, model.dims.head_dim, model.dims.rope, torch.device("cpu"))
    assert [torch.equal(positions.cos, expected) for positions in seen] == [True] * 3


def test_norm_computes_in_fp32_and_rounds_once() -> None:
    model = build()
    norm = model.model.norm.bfloat16()
    features = torch.randn(
        4, MULTI_HEAD["hidden_size"], generator=torch.Generator().manual_seed(6)
    ).bfloat16()
    exact = features.double() / (features.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = (exact * norm.weight.double()).float().bfloat16()
    # An fp32 tie may round either way.
    assert (norm(features) != exact).float().mean() < 0.02


def test_initial_values_have_the_configured_distribution() -> None:
    model = build(init_std=0.05)
    generator = torch.Generator().manual_seed(7)
    drawn = model.initial_value(
        "model.layers.1.mlp.up_proj.weight", torch.Size([301, 203]), generator
    )
    assert drawn.dtype == torch.float32
    assert drawn.device.type == "cpu"
    count = drawn.numel()
    assert abs(drawn.mean()) < 5 * 0.05 / count**0.5  # five standard errors
    assert drawn.std() == pytest.approx(0.05, rel=5 / (2 * count) ** 0.5)


def test_initial_values_cover_every_parameter_and_are_ones_for_norms() -> None:
    model = build()
    for name, parameter in model.named_parameters():
        value = model.initial_value(name, parameter.shape, torch.Generator().manual_seed(8))
        assert value.shape == parameter.shape
        assert bool((value == 1).all()) == bool(re.search("norm", name)), name


def test_initial_values_depend_only_on_their_generator() -> None:
    with torch.device("meta"):
        model = MODELS.build(LlamaConfig(size="9m", **MULTI_HEAD))
    names = ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]

    def draw(order: list[str]) -> dict[str, Tensor]:
        torch.manual_seed(len(order) + order.index(names[0]))
        shape = torch.Size([3, 5])
        return {
            name: model.initial_value(name, shape, torch.Generator().manual_seed(names.index(name)))
            for name in order
        }

    forwards, backwards = draw(names), draw(names[::-1])
    for name in names:
        assert torch.equal(forwards[name], backwards[name])
    assert not torch.equal(forwards[names[0]], forwards[names[1]])


def test_flops_per_token_are_three_times_those_of_a_forward_pass() -> None:
    """torch's counter on a forward pass; a backward pass costs twice as much."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(**GROUPED)
    batch, seq = 2, 16
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(*draw_tokens(batch, seq))
    assert model.num_flops_per_token(seq) * batch * seq == 3 * counter.get_total_flops()


def test_model_fulfils_the_contract_and_lists_its_blocks_in_order() -> None:
    model = build()
    assert isinstance(model, LanguageModel)
    assert list(model.blocks()) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    for name, block in model.blocks().items():
        assert model.get_submodule(name) is block
