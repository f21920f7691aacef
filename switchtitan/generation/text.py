"""Text to tokens and sequences, and tokens to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from switchtitan.data.sequences import ONE_SOURCE, Sequences, TokenSequences
from switchtitan.data.tokenizer import DocumentTokenizer, TextSize
from switchtitan.errors import ConfigError


def read_text(option: str, file: str) -> str:
    """Returns the UTF-8 text of the file that a command's option gives; `-` is standard input.
    Raises a ConfigError if it cannot be read."""
    try:
        with open(0 if file == "-" else file, "rb") as stream:
            return stream.read().decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{option} {file}: cannot be read ({reason}); expected a UTF-8 file"
        ) from error


def text_pieces(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Yields the text after a prompt while its tokens come, in pieces that end between characters.

    Special tokens have no text. The last piece is what was held back until the tokens ended.
    """
    read, num_shown = list(prompt), len(tokenizer.decode(list(prompt)))
    for token in tokens:
        read.append(token)
        # The text of a token depends on those before it.
        piece = tokenizer.decode(read)[num_shown:]
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character, so far
            piece = ""
        num_shown += len(piece)
        yield piece
    yield tokenizer.decode(read)[num_shown:]


def held_out_text(
    file: str, num_tokens: int | None, own: DocumentTokenizer, seq_len: int
) -> tuple[Sequences, range, TextSize]:
    """Returns the sequences of a text file, one document without its end, the last one padded; the
    places of its tokens among their targets, of which each is one once; and its size. Takes only
    its first `num_tokens` tokens if that is not None. Raises a ConfigError if the file cannot be
    read, is not UTF-8 or is empty."""
    text = read_text("--text", file)
    encoding = own.tokenizer.encode(text, add_special_tokens=False)
    ids = encoding.ids
    if num_tokens is not None and num_tokens < len(ids):
        ids = ids[:num_tokens]
        text = text[: encoding.offsets[num_tokens - 1][1]]
    if not ids:
        raise ConfigError(f"--text {file}: has no text; expected a UTF-8 file with text")
    # A text follows what the tokenizer begins with, or the end of a document.
    context = own.bos_ids or [own.eos_id]
    end = len(context) - 1 + len(ids)
    padded = np.full(-(-end // seq_len) * seq_len + 1, own.eos_id)
    padded[: end + 1] = [*context, *ids]
    sequences = Sequences([TokenSequences([padded], seq_len, own.eos_id)], [file], ONE_SOURCE)
    return sequences, range(len(context) - 1, end), TextSize(len(ids), len(text.encode()))
