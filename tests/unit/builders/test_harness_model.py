"""Continuations for the lm-evaluation-harness: in batches, and other draws for repeats."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from switchtitan.data.tokenizer import train_tokenizer
from switchtitan.models import MODELS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="the package lm-eval is not installed; run `pip install 'switchtitan[lm-eval]'`",
)
CONTEXTS = ["hello", "hello world hello world", "", "world", "world hello"]


class CountedModel(torch.nn.Module):
    """The model, and the number of rows of each of its passes."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.rows = model, []

    def forward(self, tokens, *arguments, **keys):
        self.rows.append(len(tokens))
        return self.inner(tokens, *arguments, **keys)

    def new_cache(self, *arguments):
        return self.inner.new_cache(*arguments)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["hello world "] * 3, 270)


@pytest.fixture
def make_model(tokenizer):
    """Builds the harness's view of a small model with clearly different logits."""
    from switchtitan.builders.harness_model import HarnessModel

    config = MODELS["llama"].config_type.model_validate(
        {
            "name": "llama",
            "hidden_size": 20,
            "intermediate_size": 28,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 270,
        }
    )

    def make(batch_size):
        torch.manual_seed(0)
        model = MODELS.build(config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.4)
        counted = CountedModel(model.requires_grad_(False).eval())
        harness_model = HarnessModel(
            counted,
            tokenizer,
            stops=frozenset([tokenizer.eos_id]),
            max_length=64,
            batch_size=batch_size,
            device=torch.device("cpu"),
        )
        return harness_model, counted.rows

    return make


def requests(*contexts, **settings):
    keys = {"until": [], "max_gen_toks": 7, **settings}
    return [SimpleNamespace(args=(context, keys)) for context in contexts]


DRAWN = {"do_sample": True, "temperature": 1.0}


def test_repeats_of_a_drawn_request_differ_and_a_second_run_repeats_them(make_model):
    repeated = requests("hello", "hello", "hello", **DRAWN)
    for batch_size in (1, 2):
        model, _ = make_model(batch_size)
        first = [model.generate_until(repeated, True), model.generate_until(repeated, True)]
        assert len({text for texts in first for text in texts}) == 6
        again, _ = make_model(batch_size)
        assert [again.generate_until(repeated, True) for _ in range(2)] == first
    # Negative control: nothing is drawn for the most probable tokens.
    model, _ = make_model(2)
    assert len(set(model.generate_until(requests("hello", "hello", "hello"), True))) == 1


def test_batches_give_the_texts_of_single_requests(make_model):
    greedy = requests(*CONTEXTS)
    greedy += requests("hello hello", max_gen_toks=3) + requests("world", until=["e"])
    alone, rows = make_model(1)
    expected = alone.generate_until(greedy, True)
    assert set(rows) == {1}
    assert len(set(expected)) > 4
    assert not any(text == "" for text in expected)
    model, rows = make_model(3)
    assert model.generate_until(greedy, True) == expected
    # Six requests with 7 new tokens in two batches, then one with 3.
    assert rows == [3] * 14 + [1] * 3


def test_a_text_that_is_complete_does_not_grow_with_its_batch(make_model):
    (whole,) = make_model(1)[0].generate_until(requests("world"), True)
    end = whole[2]
    batch = requests("world", until=[end]) + requests("world", until=["<never>"])
    assert make_model(2)[0].generate_until(batch, True) == [whole.partition(end)[0], whole]
    model, rows = make_model(2)
    model.generate_until(requests("world", until=[end]) * 2, True)
    # Both are complete, so that no further token is computed.
    assert 0 < len(rows) < 7
