"""Builds a run's corpus, training batches and evaluators."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Literal

from switchtitan.contracts import Batch, SummedLoss
from switchtitan.data import (
    Corpus,
    build_train_batches,
    build_validation_batches,
    open_corpus,
)
from switchtitan.distributed.world import World
from switchtitan.job.config import JobConfig
from switchtitan.training.evaluate import Evaluator, Evaluators
from switchtitan.training.step import TrainState

# Imported where it is built: most runs have no prompts.
if TYPE_CHECKING:
    from switchtitan.data.text import TextSize
    from switchtitan.training.prompts import Prompts


def open_checked_corpus(config: JobConfig, world: World) -> Corpus:
    """Open the corpus, preparing it if necessary, and check that its token ids fit the model."""
    return open_corpus(config.data, ranks=world, model_vocab_size=config.model.vocab_size)


def build_batches(
    config: JobConfig, corpus: Corpus, world: World, state: TrainState
) -> Generator[list[Batch], None, None]:
    """Build this rank's training batches, starting at `state.next_batch`.

    Their `close` ends the processes that read them.
    """
    return build_train_batches(
        corpus.train_split(config.data.seq_len),
        seed=config.job.seed,
        global_batch_size=config.training.global_batch_size,
        local_batch_size=config.training.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
        start_step=state.next_batch,
        num_workers=config.data.num_workers,
        pin_memory=world.device.type == "cuda",
    )


def build_evaluators(
    config: JobConfig, corpus: Corpus, loss: SummedLoss, world: World
) -> Evaluators:
    tokens, test_tokens = config.evaluation.tokens, config.evaluation.test_tokens
    return Evaluators(
        build_evaluator(config, corpus, "validation", tokens, loss, world),
        None
        if test_tokens is None
        else build_evaluator(config, corpus, "test", test_tokens, loss, world),
        build_prompts(config, corpus, world) if config.evaluation.prompts else None,
    )


def build_prompts(config: JobConfig, corpus: Corpus, world: World) -> "Prompts":
    """Build what continues the configured prompts.

    Raises:
        ConfigError: if a prompt is too long.
    """
    from switchtitan.training.prompts import Prompts

    return Prompts(
        config.evaluation.prompts,
        corpus.tokenizer(),
        num_tokens=config.evaluation.prompt_tokens,
        seq_len=config.data.seq_len,
        device=world.device,
    )


def build_evaluator(
    config: JobConfig,
    corpus: Corpus,
    split: Literal["validation", "test"],
    num_tokens: int,
    loss: SummedLoss,
    world: World,
) -> Evaluator:
    sequences = corpus.held_out_split(split, config.data.seq_len)
    batches = build_validation_batches(
        sequences,
        num_sequences=num_tokens // config.data.seq_len,
        local_batch_size=config.training.local_batch_size,
        rank=world.rank,
        num_ranks=world.size,
    )

    def read_size() -> "TextSize":
        # Imported here: it is called once, at the end of a run.
        from switchtitan.data.text import size_of_sequences

        return size_of_sequences(sequences, batches.num_sequences, corpus.tokenizer())

    return Evaluator(batches, loss, world, read_size)
