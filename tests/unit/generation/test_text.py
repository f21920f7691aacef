"""Text comes in full characters, and its pieces are the text of all tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from switchtitan.data.tokenizer import train_tokenizer
from switchtitan.generation.text import REPLACEMENT, TextStream, prefix_ids, prompt_ids

TEXT = "Größe: 5 €, 日本語 and 👩‍🔬 emoji. "


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return train_tokenizer([TEXT * 3, "an ordinary text"], 280).tokenizer


@pytest.fixture(scope="module")
def word_pieces() -> Tokenizer:
    """Like SentencePiece: a word begins with a mark, which at the start of a text is no space."""
    pieces = ["<unk>", "▁", *"abcdefgh", "▁a", "▁b", "cd", "<0xE2>", "<0x82>", "<0xAC>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁", "b"), ("c", "d")], byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces_of(tokenizer, prompt, tokens):
    stream = TextStream(tokenizer, prompt)
    return [*(stream.add(token) for token in tokens), stream.rest()]


def test_pieces_are_full_characters(byte_level):
    tokens = byte_level.encode(TEXT).ids
    pieces = pieces_of(byte_level, [], tokens)
    assert "".join(pieces) == TEXT
    assert "" in pieces  # a token that is a part of a character
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_pieces_of_random_bytes_are_the_text_of_all(byte_level):
    drawn = random.Random(0)
    for _ in range(200):
        ids = [drawn.randrange(1, byte_level.get_vocab_size()) for _ in range(40)]
        prompt = byte_level.encode("and ").ids
        whole = byte_level.decode(prompt + ids)
        assert "and " + "".join(pieces_of(byte_level, prompt, ids)) == whole


def test_pieces_of_random_words_are_the_text_of_all(word_pieces):
    # Three bytes of one character. The decoder takes back characters before bytes that are none.
    euro = [word_pieces.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    units = [*([id] for id in range(1, euro[0])), euro]
    drawn = random.Random(0)
    for _ in range(200):
        words = [drawn.choice(units) for _ in range(40)]
        ids = [id for unit in words for id in unit]
        cut = len(words[0])
        start = word_pieces.decode(ids[:cut])
        pieces = pieces_of(word_pieces, ids[:cut], ids[cut:])
        assert start + "".join(pieces) == word_pieces.decode(ids)


def test_a_word_after_the_prompt_keeps_its_space(word_pieces):
    a, b = (word_pieces.token_to_id(piece) for piece in ("▁a", "▁b"))
    assert pieces_of(word_pieces, [a], [b, a]) == [" b", " a", ""]
    assert pieces_of(word_pieces, [], [b, a]) == ["b", " a", ""]


def test_what_never_becomes_a_character_comes_at_the_end(byte_level):
    tokens = byte_level.encode("€").ids
    assert pieces_of(byte_level, [], tokens[:1]) == ["", REPLACEMENT]


def test_a_prompt_begins_as_the_tokenizer_begins_texts_and_does_not_end(byte_level):
    tokenizer = Tokenizer.from_str(byte_level.to_str())
    plain = tokenizer.encode("and").ids
    assert prompt_ids(tokenizer, "and") == plain
    for template, expected in (("<b> $A", [9]), ("$A <e>", []), ("<b> $A <e>", [9])):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<b>", 9), ("<e>", 0)]
        )
        assert prefix_ids(tokenizer) == expected
        assert prompt_ids(tokenizer, "and") == expected + plain
