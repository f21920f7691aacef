"""Continuations with a cache are those without one, and those of transformers."""

from pathlib import Path

import pytest
import torch
from support.held_weights import HeldWeights
from support.tiny import COMPILED, full_tensors, tiny_trainer, train_steps
from torch import Tensor
from transformers import AutoModelForCausalLM

from switchtitan.generation.decoding import continuations
from switchtitan.generation.sampling import Sampler, Sampling
from switchtitan.hub.export_folder import export_dense
from switchtitan.models import MODELS
from switchtitan.models.cola import ColaConfig
from switchtitan.models.llama.config import LlamaConfig
from switchtitan.models.llama.model import Llama
from switchtitan.models.qwen2.config import Qwen2Config

CPU = torch.device("cpu")
PROMPTS = [[5, 17, 3, 44, 9], [8], [30, 31, 32, 2, 1, 52, 7, 7]]
GREEDY = Sampler(Sampling(temperature=0))
CONFIGS = {
    "grouped heads": LlamaConfig(
        size="9m",
        hidden_size=36,
        num_heads=6,
        num_kv_heads=2,
        intermediate_size=29,
        num_layers=3,
        vocab_size=53,
        rope_theta=700.0,
    ),
    "long context, tied head": LlamaConfig(
        hidden_size=28,
        num_heads=4,
        num_kv_heads=1,
        head_dim=10,
        intermediate_size=33,
        num_layers=2,
        vocab_size=53,
        tied_head=True,
        rope_type="llama3",
        rope_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_original_positions=16,
    ),
    "qwen2": Qwen2Config(
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=37,
        num_layers=2,
        vocab_size=53,
        rope_theta=1e6,
    ),
    "cola": ColaConfig(
        hidden_size=32,
        num_heads=4,
        intermediate_size=37,
        num_layers=2,
        vocab_size=53,
        rank=7,
    ),
    "equal heads": LlamaConfig(
        size="9m", hidden_size=24, num_heads=3, intermediate_size=31, num_layers=2, vocab_size=53
    ),
}


def random_model(config, seed=0) -> Llama:
    """A model whose logits differ clearly: weights of the usual size give nearly equal ones."""
    generator = torch.Generator().manual_seed(seed)
    model = MODELS.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Llama:
    return random_model(CONFIGS[request.param])


def run(model, choose=GREEDY, num_tokens=12, prompts=PROMPTS) -> list[list[int]]:
    """One list of new tokens per prompt."""
    steps = list(continuations(model, prompts, choose, num_tokens, CPU))
    return [list(row) for row in zip(*steps, strict=True)]


class Recorder:
    """Chooses greedily, and keeps all logits."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, logits: Tensor) -> list[int]:
        self.logits.append(logits)
        return GREEDY(logits)


def test_cached_logits_equal_those_of_the_uncached_model(model):
    record = Recorder()
    tokens = run(model, record)
    for row, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        sequence = torch.tensor([prompt + new[:-1]])
        with torch.no_grad():
            expected = model(sequence, torch.zeros_like(sequence, dtype=torch.int32))
        found = torch.stack([logits[row] for logits in record.logits])
        # Attention with a mask adds up in another order than causal attention: a few roundings.
        torch.testing.assert_close(found, expected[0, len(prompt) - 1 :], rtol=1e-4, atol=1e-4)


def test_a_cache_that_forgets_to_advance_changes_the_logits(model, monkeypatch):
    """Shows that the check above can fail."""
    monkeypatch.setattr(
        "switchtitan.models.llama.cache.KeyValueCache.advance", lambda self, num_tokens: None
    )
    with pytest.raises(AssertionError):
        test_cached_logits_equal_those_of_the_uncached_model(model)


def test_a_model_without_a_cache_gives_the_same_tokens(model, monkeypatch):
    cached = run(model)
    monkeypatch.setattr(Llama, "new_cache", lambda *_: None)
    assert run(model) == cached


def test_prompts_do_not_affect_each_other(model):
    assert run(model) == [run(model, prompts=[prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].huggingface_config(64)])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path: Path):
    config = CONFIGS[name]
    model = random_model(config)
    export_dense(
        HeldWeights(model.state_dict()), config, tmp_path / "out", torch.float32, seq_len=64
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for prompt, ours in zip(PROMPTS, run(model, num_tokens=30), strict=True):
        generated = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=30,
            pad_token_id=0,
        )
        assert generated[0, len(prompt) :].tolist() == ours
    assert run(random_model(config, seed=1)) != run(model)  # the tokens depend on the weights


def test_reading_more_tokens_than_the_cache_holds_is_an_error(model):
    cache = model.new_cache(1, 3, CPU)
    tokens = torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match="holds 3 tokens per sequence, and 4"):
        model(tokens, torch.zeros_like(tokens, dtype=torch.int32), cache=cache)


def test_continuations_between_compiled_steps_compile_nothing_and_change_no_weight(
    corpora: Path, fresh_compiler: None
):
    ends = []
    for is_interrupted in (False, True):
        trainer = tiny_trainer(corpora / "decoding", "switchlora", *COMPILED)
        train_steps(trainer, 2)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                if is_interrupted:
                    run(trainer.stepper.model, num_tokens=4)
                train_steps(trainer, 1)
        trainer.stepper.close()
        ends.append(full_tensors(trainer))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
