"""The bytes of tokens are those of the text, for any part of a split."""

import numpy as np
import pytest
from support.tiny import tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from switchtitan.data import open_corpus
from switchtitan.data.text_bytes import bytes_by_token, num_text_bytes
from switchtitan.data.tokenizer import DocumentTokenizer, train_tokenizer

TEXTS = ["größe = 5 €", "日本語 and more", "</s> in a text", ""]


@pytest.fixture(params=["byte-level", "words"])
def documents(request):
    if request.param == "byte-level":
        return train_tokenizer([*TEXTS, *TEXTS], 290)
    alphabet = sorted(set("".join(TEXTS)) - {" "})
    vocabulary = {piece: index for index, piece in enumerate(["</s>", "▁", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return DocumentTokenizer(tokenizer, "</s>")


def stream_of(documents):
    """The tokens of all texts with their ends, after a first end."""
    stream = [documents.eos_id]
    for ids in documents.encode_documents(TEXTS):
        stream += [*ids, documents.eos_id]
    return np.array(stream)


def test_documents_have_the_bytes_of_their_text(documents):
    num_bytes = num_text_bytes(stream_of(documents), documents)
    assert num_bytes == sum(len(text.encode()) for text in TEXTS)
    assert num_bytes != sum(len(text) for text in TEXTS)


def test_parts_add_up_to_the_whole(documents):
    """The last token of a part is the first one of the next, where it is not counted."""
    stream = stream_of(documents)
    for cut in range(1, len(stream)):
        parts = stream[: cut + 1], stream[cut:]
        if bytes_by_token(documents) is None and not _is_between_words(documents, stream, cut):
            continue
        assert sum(num_text_bytes(part, documents) for part in parts) == num_text_bytes(
            stream, documents
        )


def _is_between_words(documents, stream, cut):
    """A text that starts with a word has no space before it."""
    return stream[cut] == documents.eos_id


def test_a_full_split_has_the_bytes_that_its_preparation_counted(corpora):
    corpus = open_corpus(tiny_config(corpora / "bytes", "full_rank").data)
    num_tokens = corpus.index.num_tokens("validation")
    tokens = corpus.split("validation", 1).read(0, num_tokens)
    first = bytes_by_token(corpus.tokenizer())[tokens[0]]  # no target
    assert num_text_bytes(tokens, corpus.tokenizer()) + first == sum(
        shard.bytes_of_text for shard in corpus.index.splits["validation"]
    )
