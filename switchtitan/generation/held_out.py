"""The batches of a text that a trained model is evaluated on."""

from collections.abc import Sequence

import torch

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.sequences import document_ids
from switchtitan.data.text import TextSize
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.generation.text import prefix_ids, read_text


def held_out_text(
    file: str,
    num_tokens: int | None,
    own: DocumentTokenizer,
    seq_len: int,
    local_batch_size: int,
    world: World,
) -> tuple[list[Batch], TextSize]:
    """Returns this rank's batches of a text file, one document without its end, and its size.

    Args:
        num_tokens: only that many tokens at its start; None for all.
        seq_len: tokens per sequence.
        local_batch_size: sequences per rank and batch.

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
    context = prefix_ids(own.tokenizer) or [own.eos_id]
    batches = text_batches(
        [*context, *ids],
        num_context=len(context),
        seq_len=seq_len,
        eos_id=own.eos_id,
        local_batch_size=local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
    )
    return batches, TextSize(len(ids), len(text.encode()))


def text_batches(
    tokens: Sequence[int],
    *,
    num_context: int,
    seq_len: int,
    eos_id: int,
    local_batch_size: int,
    rank: int,
    num_ranks: int,
) -> list[Batch]:
    """Returns a rank's batches of tokens. Each token after the context is a target once.

    Sequence i holds tokens [i * seq_len, (i + 1) * seq_len]; the last one, and sequences that fill
    batches, are padded with `IGNORED_TARGET`. All ranks have the same number of batches of the same
    shape.

    Args:
        tokens: of a text, its context first.
        num_context: tokens that are no targets, at least one.
        eos_id: the token that ends a document.
    """
    num_sequences = -(-(len(tokens) - 1) // seq_len)
    num_batches = -(-num_sequences // (num_ranks * local_batch_size))
    shape = (num_batches, num_ranks, local_batch_size, seq_len)
    inputs, targets = torch.full(shape, eos_id), torch.full(shape, IGNORED_TARGET)
    stream = torch.tensor(tokens)
    inputs.view(-1)[: len(tokens) - 1] = stream[:-1]
    targets.view(-1)[num_context - 1 : len(tokens) - 1] = stream[num_context:]
    return [
        Batch(of_rank, wanted, torch.stack([document_ids(row, eos_id) for row in of_rank]))
        for of_rank, wanted in zip(inputs[:, rank], targets[:, rank], strict=True)
    ]
