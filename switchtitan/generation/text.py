"""Text to tokens and batches, and tokens to text as they come."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.sequences import document_ids
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
    file: str, num_tokens: int | None, own: DocumentTokenizer, seq_len: int, batch_size: int
) -> tuple[list[Batch], TextSize]:
    """Returns the batches of a text file, one document without its end, and its size.

    Args:
        num_tokens: only that many tokens at its start; None for all.
        seq_len: tokens per sequence.
        batch_size: sequences per batch.

    Raises:
        ConfigError: if the file cannot be read, is not UTF-8 or is empty.
    """
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
    batches = text_batches([*context, *ids], len(context), seq_len, batch_size, own.eos_id)
    return batches, TextSize(len(ids), len(text.encode()))


def text_batches(
    tokens: Sequence[int], num_context: int, seq_len: int, batch_size: int, eos_id: int
) -> list[Batch]:
    """Returns batches of tokens. Each token after the context is a target once.

    Sequence i holds tokens [i * seq_len, (i + 1) * seq_len]; the last one, and sequences that fill
    the last batch, are padded with `IGNORED_TARGET`.

    Args:
        tokens: of a text, its context first.
        num_context: tokens that are no targets, at least one.
        eos_id: the token that ends a document.
    """
    num_batches = -(-(len(tokens) - 1) // (batch_size * seq_len))
    shape = (num_batches, batch_size, seq_len)
    inputs, targets = torch.full(shape, eos_id), torch.full(shape, IGNORED_TARGET)
    stream = torch.tensor(tokens)
    inputs.view(-1)[: len(tokens) - 1] = stream[:-1]
    targets.view(-1)[num_context - 1 : len(tokens) - 1] = stream[num_context:]
    return [
        Batch(rows, wanted, document_ids(rows, eos_id))
        for rows, wanted in zip(inputs, targets, strict=True)
    ]
