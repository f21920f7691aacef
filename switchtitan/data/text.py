"""The number of UTF-8 bytes of the text that tokens stand for, and bits per byte."""

import json
import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchtitan.data.tokenizer import DocumentTokenizer


class TextSize(NamedTuple):
    """The size of text that a model is evaluated on."""

    num_tokens: int
    """Tokens that are predicted."""
    num_bytes: int
    """UTF-8 bytes of their text. Ends of documents have none."""

    def bits_per_byte(self, loss: float) -> float | None:
        """Returns the bits that a model needs for one byte of text; None without text. `loss` is
        its mean over the tokens, in nats."""
        if self.num_bytes == 0:
            return None
        return loss * self.num_tokens / (math.log(2) * self.num_bytes)


def num_text_bytes(tokens: NDArray[np.int64], documents: DocumentTokenizer) -> int:
    """Returns the UTF-8 bytes of the text of `tokens[1:]`, [tokens], without ends of documents.

    A byte-level tokenizer's are exact for any part of a document. Those of others are counted in
    the decoded text, which lacks what the tokenizer drops, such as T5's line breaks.
    """
    table = bytes_by_token(documents)
    if table is not None:
        return int(table[tokens[1:]].sum())
    ends = np.flatnonzero(tokens == documents.eos_id)
    pieces = [part.tolist() for part in np.split(tokens, ends)]
    ids = [pieces[0], *(piece[1:] for piece in pieces[1:])]
    decoded = documents.tokenizer.decode_batch(ids, skip_special_tokens=False)
    context = documents.tokenizer.decode(ids[0][:1], skip_special_tokens=False)
    return sum(len(text.encode()) for text in decoded) - len(context.encode())


def bytes_by_token(documents: DocumentTokenizer) -> NDArray[np.int64] | None:
    """Returns the bytes of each token, [vocabulary]; None unless tokens stand for bytes."""
    decoder = json.loads(documents.serialized).get("decoder")
    if decoder is None or decoder.get("type") != "ByteLevel":
        return None
    table = np.zeros(documents.vocab_size, dtype=np.int64)
    for piece, token in documents.tokenizer.get_vocab(with_added_tokens=False).items():
        table[token] = len(piece)  # one character for each byte
    for token, added in documents.tokenizer.get_added_tokens_decoder().items():
        table[token] = 0 if added.special else len(added.content.encode())
    return table
