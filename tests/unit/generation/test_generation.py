"""Continuations with a cache are those without one; draws follow the softmax."""

import random

import pytest
import torch
from support.small_llama import LLAMA3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from switchtitan.data.tokenizer import train_tokenizer
from switchtitan.generation.text import Sampler, continuation, text_pieces
from switchtitan.models import MODELS
from switchtitan.models.cola import ColaConfig
from switchtitan.models.llama.config import LlamaConfig, Qwen2Config
from switchtitan.models.llama.model import Llama

CPU = torch.device("cpu")
GREEDY = Sampler(temperature=0)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_layers": 2,
    "vocab_size": 53,
    "num_heads": 4,
}
CONFIGS = {
    "grouped heads, long context, tied head": LlamaConfig(
        **(SHAPE | LLAMA3), num_kv_heads=1, head_dim=10, tied_head=True
    ),
    "qwen2": Qwen2Config(**SHAPE, num_kv_heads=2, rope_theta=1e6),
    "cola": ColaConfig(**SHAPE, rank=7),
}


def random_model(config, seed=0):
    """A model whose logits differ clearly: weights of the usual size give nearly equal ones."""
    generator = torch.Generator().manual_seed(seed)
    model = MODELS.build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False).eval()


@pytest.fixture(params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.mark.parametrize("prompt", [[5, 17, 3, 44, 9], [8]])
def test_cached_logits_equal_those_of_the_uncached_model(model, prompt, monkeypatch):
    recorded = []

    def choose(logits):
        recorded.append(logits)
        return GREEDY(logits)

    new = list(continuation(model, prompt, choose, 12, CPU))
    sequence = torch.tensor([prompt + new[:-1]])
    expected = model(sequence, torch.zeros_like(sequence, dtype=torch.int32))[0, len(prompt) - 1 :]
    # Attention with a mask adds up in another order than causal attention: a few roundings.
    torch.testing.assert_close(torch.stack(recorded), expected, rtol=1e-4, atol=1e-4)
    # A model may have no cache.
    monkeypatch.setattr(Llama, "new_cache", lambda *_: None)
    assert list(continuation(model, prompt, GREEDY, 12, CPU)) == new


# Drawing

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.5, 2.5, -1.0])


def draws(num_draws, **keys):
    sampler = Sampler(**{"seed": 3, **keys})
    return torch.tensor([sampler(LOGITS) for _ in range(num_draws)])


def check_frequencies(expected, **keys):
    found = torch.bincount(draws(5000, **keys), minlength=len(LOGITS)) / 5000
    assert not found[expected == 0].any()
    # Four standard deviations of the most uncertain frequency.
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * (0.25 / 5000) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    expected = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(Sampler(temperature).probabilities(LOGITS), expected)
    check_frequencies(expected, temperature=temperature)


def test_top_k_keeps_the_most_probable_tokens():
    kept = torch.tensor([1, 5, 3])
    expected = torch.zeros(7)
    expected[kept] = LOGITS[kept].softmax(0)
    torch.testing.assert_close(Sampler(top_k=3).probabilities(LOGITS), expected)
    check_frequencies(expected, top_k=3)
    everything = Sampler(top_k=7, top_p=1.0).probabilities(LOGITS)
    torch.testing.assert_close(everything, LOGITS.softmax(-1))


def test_top_p_keeps_the_fewest_tokens_that_suffice():
    ordered, order = LOGITS.softmax(0).sort(descending=True)
    sums = ordered.cumsum(0)
    for num_kept in range(1, 7):
        # Just below the sum of `num_kept` tokens, all of these are needed.
        found = Sampler(top_p=sums[num_kept - 1].item() - 1e-4).probabilities(LOGITS)
        expected = torch.zeros(7)
        expected[order[:num_kept]] = ordered[:num_kept] / sums[num_kept - 1]
        torch.testing.assert_close(found, expected)


def test_a_seed_repeats_its_tokens_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (draws(50, seed=seed).tolist() for seed in (5, 5, 6))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)
    assert GREEDY(LOGITS) == 1


# Text

TEXT = "Größe: 5 €, 日本語 and 👩‍🔬 emoji. "
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def byte_level():
    return train_tokenizer([TEXT * 3, "an ordinary text"], 280).tokenizer


@pytest.fixture(scope="module")
def word_pieces():
    """Like SentencePiece: a word begins with a mark, which at the start of a text is no space."""
    pieces = ["<unk>", "▁", *"abcdefgh", "▁a", "▁b", "cd", "<0xE2>", "<0x82>", "<0xAC>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("c", "d")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.fixture(scope="module")
def euro(word_pieces):
    """The three bytes of one character."""
    return [word_pieces.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]


def test_pieces_are_full_characters(byte_level):
    pieces = list(text_pieces(byte_level, [], byte_level.encode(TEXT).ids))
    assert "".join(pieces) == TEXT
    assert "" in pieces  # a token that is a part of a character
    assert not any(REPLACEMENT in piece for piece in pieces)
    # What never becomes a character comes at the end.
    assert list(text_pieces(byte_level, [], byte_level.encode("€").ids[:1])) == ["", REPLACEMENT]


def test_pieces_of_random_tokens_are_the_text_of_all(byte_level, word_pieces, euro):
    drawn = random.Random(0)
    # The decoder of words takes back characters before bytes that are none.
    words = [*([id] for id in range(1, euro[0])), euro]
    any_bytes = [[id] for id in range(1, byte_level.get_vocab_size())]
    for tokenizer, units in ((byte_level, any_bytes), (word_pieces, words)):
        start = byte_level.encode("and ").ids if tokenizer is byte_level else drawn.choice(units)
        for _ in range(200):
            ids = [id for _ in range(40) for id in drawn.choice(units)]
            text = tokenizer.decode(start) + "".join(text_pieces(tokenizer, start, ids))
            assert text == tokenizer.decode(start + ids)


def test_text_goes_on_after_bytes_that_take_back_a_character(word_pieces, euro):
    ids = [*word_pieces.encode("a").ids, *euro, euro[0], *word_pieces.encode("b").ids]
    pieces = list(text_pieces(word_pieces, [], [*ids, *word_pieces.encode("b").ids]))
    assert "".join(pieces).startswith("a€")
    assert pieces[-2].endswith("b")
    assert pieces[-1] == ""
