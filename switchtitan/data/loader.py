"""Batches for the training step and for validation, the same global batches for any number of ranks and
workers."""

import logging
import warnings
from collections.abc import Generator, Iterator

import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.corpus_files import TokenSequence, TokenSequences
from switchtitan.data.sampler import rank_positions, sequence_index
from switchtitan.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)


def build_train_batches(
    sequences: TokenSequences,
    *,
    seed: int,
    global_batch_size: int,
    local_batch_size: int,
    rank: int,
    num_ranks: int,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch], None, None]:
    """An endless iterator over optimizer steps: each item is the list of this rank's micro-batches of one
    step.

    Sequence i of the global batch of step t is a function of (seed, t, i) alone, so the step is all that a
    resume needs, on any number of ranks. Worker processes start with the first item and end with `close()` on
    the iterator.

    Args:
        sequences: the training split.
        seed: the job's seed.
        global_batch_size: sequences in an optimizer step over all ranks; a multiple of `num_ranks *
            local_batch_size`.
        local_batch_size: sequences in a micro-batch on one rank.
        rank, num_ranks: of the ranks that read different data.
        start_step: the first step to yield.
        num_workers: processes that read ahead; 0 reads in the calling process.
        pin_memory: whether batches come in page-locked memory, for copies to a CUDA device.

    Raises:
        ConfigError: if the global batch cannot be divided so.
        CorpusError: if the split has fewer sequences than a global batch.
    """
    per_micro_step = num_ranks * local_batch_size
    if global_batch_size % per_micro_step:
        raise ConfigError(
            f"[training] global_batch_size = {global_batch_size}: expected a multiple of ranks x "
            f"local_batch_size = {num_ranks} x {local_batch_size} = {per_micro_step}"
        )
    if len(sequences) < global_batch_size:
        raise CorpusError(
            f"[training] global_batch_size = {global_batch_size}: the training split has {len(sequences):,} "
            f"sequences of {sequences.seq_len} tokens, fewer than one global batch; lower it, shorten [data] "
            f"seq_len or use a larger corpus"
        )
    order = _RankOrder(
        seed=seed,
        num_sequences=len(sequences),
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        rank=rank,
        num_ranks=num_ranks,
        start_step=start_step,
    )
    with warnings.catch_warnings():
        # torchdata calls a function of torch that torch has deprecated.
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        loader = StatefulDataLoader(
            sequences,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            # Else the loader draws its workers' seed from the global generator and disturbs other draws.
            generator=torch.Generator(),
        )
    return _steps(loader, global_batch_size // per_micro_step)


def build_validation_batches(
    sequences: TokenSequences,
    *,
    num_sequences: int,
    local_batch_size: int,
    rank: int,
    num_ranks: int,
) -> "ValidationBatches":
    """The first `num_sequences` of the held-out split, dealt to the ranks, readable again and again.

    Every rank gets the same number of batches of the same shape; what is missing at the end is filled with
    sequences whose targets are all `IGNORED_TARGET`, so sums over targets and their counts do not depend on
    the number of ranks. (A batch may be all filling: divide by the count of all ranks, not by a batch's own.)
    """
    if num_sequences > len(sequences):
        logger.warning(
            "validation asks for %d sequences; the held-out split has %d, all of which are used",
            num_sequences,
            len(sequences),
        )
    return ValidationBatches(
        sequences, min(num_sequences, len(sequences)), local_batch_size, rank, num_ranks
    )


class ValidationBatches:
    """A rank's validation batches; see `build_validation_batches`."""

    def __init__(
        self,
        sequences: TokenSequences,
        num_sequences: int,
        local_batch_size: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.num_sequences = num_sequences
        self._sequences = sequences
        self._local_batch_size = local_batch_size
        self._rank = rank
        self._num_ranks = num_ranks

    def __len__(self) -> int:
        return -(-self.num_sequences // (self._num_ranks * self._local_batch_size))

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            first = (batch * self._num_ranks + self._rank) * self._local_batch_size
            indices = range(first, first + self._local_batch_size)
            batch_of = collate(
                [self._sequences[min(index, self.num_sequences - 1)] for index in indices]
            )
            is_filling = torch.tensor([index >= self.num_sequences for index in indices])
            batch_of.targets[is_filling] = IGNORED_TARGET
            yield batch_of


def collate(samples: list[TokenSequence]) -> Batch:
    """Stacks sequences into a batch whose targets are the tokens one place on."""
    tokens = torch.stack([sample.tokens for sample in samples])
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        document_ids=torch.stack([sample.document_ids for sample in samples]),
    )


class _RankOrder(Sampler[list[int]]):
    """The sequences of this rank's micro-batches, from a given step on, without end."""

    def __init__(
        self,
        *,
        seed: int,
        num_sequences: int,
        global_batch_size: int,
        local_batch_size: int,
        rank: int,
        num_ranks: int,
        start_step: int,
    ) -> None:
        self.seed = seed
        self.num_sequences = num_sequences
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            for micro_batch in range(
                self.global_batch_size // (self.num_ranks * self.local_batch_size)
            ):
                positions = rank_positions(
                    step,
                    micro_batch,
                    global_batch_size=self.global_batch_size,
                    local_batch_size=self.local_batch_size,
                    rank=self.rank,
                    num_ranks=self.num_ranks,
                )
                yield sequence_index(self.seed, positions, self.num_sequences).tolist()
            step += 1


def _steps(
    loader: StatefulDataLoader[Batch], micro_batches: int
) -> Generator[list[Batch], None, None]:
    batches = iter(loader)
    while True:
        yield [next(batches) for _ in range(micro_batches)]
