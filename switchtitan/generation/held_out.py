"""What a trained model is evaluated on: a split of a prepared corpus, or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.corpus import Corpus, SplitName
from switchtitan.data.loader import ValidationBatches
from switchtitan.data.sequences import document_ids
from switchtitan.data.text import TextSize, size_of_sequences
from switchtitan.data.tokenizer import DocumentTokenizer
from switchtitan.distributed.world import World
from switchtitan.errors import ConfigError
from switchtitan.generation.text import prefix_ids


class Shape(NamedTuple):
    """How tokens are cut into batches."""

    seq_len: int
    """Tokens per sequence."""
    local_batch_size: int
    """Sequences per rank and batch."""


@dataclass(frozen=True)
class HeldOut:
    """Text to evaluate a model on."""

    batches: ValidationBatches | list[Batch]
    """This rank's."""
    size: TextSize
    """Over all ranks."""


def held_out_split(
    corpus: Corpus, split: SplitName, num_tokens: int, shape: Shape, world: World
) -> HeldOut:
    """Returns the first tokens of a split, for a model with the corpus's tokenizer.

    Raises:
        CorpusError: if there is no such split, or it is shorter than one sequence.
    """
    sequences = corpus.split(split, shape.seq_len)
    batches = ValidationBatches(
        sequences,
        num_sequences=num_tokens // shape.seq_len,
        local_batch_size=shape.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
    )
    size = size_of_sequences(sequences, batches.num_sequences, corpus.tokenizer())
    return HeldOut(batches, size)


def held_out_text(
    file: Path, num_tokens: int | None, own: DocumentTokenizer, shape: Shape, world: World
) -> HeldOut:
    """Returns a text file as one document, without its end.

    Args:
        num_tokens: only that many tokens at its start; None for all.

    Raises:
        ConfigError: if the file cannot be read, is not UTF-8 or is empty.
    """
    try:
        text = file.read_bytes().decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--text {file}: cannot be read ({reason}); expected a UTF-8 file"
        ) from error
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
        seq_len=shape.seq_len,
        eos_id=own.eos_id,
        local_batch_size=shape.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
    )
    return HeldOut(batches, TextSize(len(ids), len(text.encode())))


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
