"""What a trained model is opened with: its weights in one dtype, its tokenizer and stop tokens; and
the batches of a text that it is evaluated on."""

import itertools
import json

import pytest
import torch
from support.folders import save_random_model
from support.tiny import tiny_toml
from support.tiny_documents import save_tokenizer

from switchtitan.contracts import IGNORED_TARGET, LowRankUpdate
from switchtitan.data.loader import ValidationBatches
from switchtitan.data.tokenizer import read_tokenizer, train_tokenizer
from switchtitan.generation.text import held_out_text
from switchtitan.generation.trained import (
    for_evaluation,
    open_tokenizer,
    open_trained_model,
    stop_tokens,
)
from switchtitan.hub.peft_folder import write_adapter
from switchtitan.job.config import parse_saved


@pytest.fixture
def base(tmp_path):
    """A folder with a tokenizer and two stop tokens."""
    folder = save_random_model("llama", tmp_path / "model")
    (folder / "tokenizer.json").write_text(train_tokenizer(["one two three"] * 3, 270).serialized)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 8]}))
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """An adapter as PEFT writes it: without the files of its base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    update = LowRankUpdate(torch.zeros(2, 54), torch.zeros(2, 77), 2.0)
    write_adapter([("model.layers.0.mlp.up_proj", update)], folder, base, torch.float32, None)
    return folder


def test_an_adapter_has_the_tokenizer_and_the_stops_of_its_base_or_its_own(base, adapter):
    trained = open_trained_model(adapter)
    tokenizer = open_tokenizer(trained)
    assert tokenizer.sha256 == read_tokenizer(base).sha256
    assert stop_tokens(trained, tokenizer) == {5, 8}
    own = train_tokenizer(["four five six"] * 3, 280)
    (adapter / "tokenizer.json").write_text(own.serialized)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    trained = open_trained_model(adapter)
    tokenizer = open_tokenizer(trained)
    assert tokenizer.sha256 == read_tokenizer(adapter).sha256 != read_tokenizer(base).sha256
    assert stop_tokens(trained, tokenizer) == {9}


def test_a_checkpoint_of_a_compiled_run_is_opened_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    saved = tiny_toml("outputs", "full_rank", {"[compile]": "[compile]\nblocks = true"})
    assert for_evaluation(parse_saved(saved)).compile.blocks


@pytest.mark.parametrize("seq_len", [2, 3, 5, 13, 20])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> </s> $A"])
def test_every_token_of_a_text_is_a_target_once_on_any_number_of_ranks(seq_len, template, tmp_path):
    """It follows what the tokenizer begins a text with, or the end of a document."""
    save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<s>", template=template)
    (tmp_path / "text").write_text("a b b a a b a b b b a a b")
    tokenizer = read_tokenizer(tmp_path)
    sequences, targets, size = held_out_text(str(tmp_path / "text"), None, tokenizer, seq_len)
    assert size == (13, 25)
    context = tokenizer.bos_ids or [tokenizer.eos_id]
    stream = [*context, 1, 2, 2, 1, 1, 2, 1, 2, 2, 2, 1, 1, 2]
    for num_ranks in (1, 2):
        pairs = []
        for rank in range(num_ranks):
            batches = ValidationBatches(sequences, len(sequences), 2, rank, num_ranks, targets)
            for batch in batches:
                both = (batch.tokens.flatten().tolist(), batch.targets.flatten().tolist())
                pairs += [pair for pair in zip(*both, strict=True) if pair[1] != IGNORED_TARGET]
        assert sorted(pairs) == sorted(list(itertools.pairwise(stream))[len(context) - 1 :])
