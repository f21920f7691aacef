"""Training and validation batches, independent of the numbers of ranks and workers."""

import logging
import signal
import warnings
from collections.abc import Generator, Iterator
from itertools import count

import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.mixture import InterleavedSequences, MixedSequences
from switchtitan.data.order import rank_positions
from switchtitan.data.sequences import TokenSequence, TokenSequences
from switchtitan.errors import ConfigError, CorpusError

logger = logging.getLogger(__name__)

TrainSequences = TokenSequences | MixedSequences
HeldOutSequences = TokenSequences | InterleavedSequences


def build_train_batches(
    sequences: TrainSequences,
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
    """Iterates endlessly over optimizer steps; an item is the list of this rank's micro-batches.

    Sequence i of the global batch of step t is a function of (seed, t, i), so resuming needs only
    the step, on any number of ranks. Worker processes start with the first item; `close()` on the
    iterator ends them.

    Args:
        sequences: the training split.
        seed: the job's seed.
        global_batch_size: sequences per optimizer step over all ranks; a multiple of `num_ranks *
            local_batch_size`.
        local_batch_size: sequences per micro-batch on one rank.
        rank, num_ranks: among the ranks that read different data.
        start_step: the first step to yield.
        num_workers: processes that prefetch; 0 reads in the calling process.
        pin_memory: whether batches are in pinned memory, for copies to a CUDA device.

    Raises:
        ConfigError: if the global batch size is not such a multiple.
        CorpusError: if the split has fewer sequences than a global batch.
    """
    _check_global_batch_size(global_batch_size, local_batch_size, num_ranks, sequences)
    order = _RankOrder(
        seed=seed,
        sequences=sequences,
        global_batch_size=global_batch_size,
        local_batch_size=local_batch_size,
        rank=rank,
        num_ranks=num_ranks,
        start_step=start_step,
    )
    with warnings.catch_warnings():
        # torchdata calls a deprecated function of torch.
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        loader = StatefulDataLoader(
            sequences,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            # Otherwise the loader draws its workers' seed from the global generator.
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
        )
    return _steps(loader, order, global_batch_size // (num_ranks * local_batch_size))


def build_validation_batches(
    sequences: HeldOutSequences,
    *,
    num_sequences: int,
    local_batch_size: int,
    rank: int,
    num_ranks: int,
) -> "ValidationBatches":
    """Returns batches of the first `num_sequences` held-out sequences, distributed over the ranks.

    Every rank gets the same number of batches of the same shape. Padding sequences at the end have
    only `IGNORED_TARGET` targets, so sums over targets and their counts do not depend on the number
    of ranks. A batch may be all padding: divide by the count over all ranks, not by the batch's
    own."""
    if num_sequences > len(sequences):
        logger.warning(
            "the held-out split has %d of the %d sequences asked for by [evaluation] tokens or "
            "test_tokens; using all of them",
            len(sequences),
            num_sequences,
        )
    return ValidationBatches(
        sequences, min(num_sequences, len(sequences)), local_batch_size, rank, num_ranks
    )


class ValidationBatches:
    """A rank's validation batches; see `build_validation_batches`."""

    def __init__(
        self,
        sequences: HeldOutSequences,
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
            stacked = collate(
                [self._sequences[min(index, self.num_sequences - 1)] for index in indices]
            )
            is_padding = torch.tensor([index >= self.num_sequences for index in indices])
            # Not in place: the targets of a single sequence are a view of its tokens' memory.
            targets = stacked.targets.masked_fill(is_padding[:, None], IGNORED_TARGET)
            yield stacked._replace(targets=targets)


def collate(samples: list[TokenSequence]) -> Batch:
    """Stacks sequences into a batch; targets are the tokens shifted by one."""
    tokens = torch.stack([sample.tokens for sample in samples])
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        targets=tokens[:, 1:].contiguous(),
        document_ids=torch.stack([sample.document_ids for sample in samples]),
    )


class _RankOrder(Sampler[list[int]]):
    """The sequence indices of this rank's micro-batches, from `start_step` on, without end."""

    def __init__(
        self,
        *,
        seed: int,
        sequences: TrainSequences,
        global_batch_size: int,
        local_batch_size: int,
        rank: int,
        num_ranks: int,
        start_step: int,
    ) -> None:
        self.seed = seed
        self.sequences = sequences
        self.global_batch_size = global_batch_size
        self.local_batch_size = local_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.start_step = start_step

    def steps(self) -> Iterator[int]:
        """Yields the numbers of the steps."""
        return count(self.start_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
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
                yield self.sequences.ordered(self.seed, positions).tolist()


_WORKER_ENDS_AFTER_S = 600
"""After SIGTERM, if its rank has not ended it before."""


def _outlive_signals(_worker: int) -> None:
    """Lets a worker read batches until its rank has stopped: batch systems, terminals and torchrun
    signal both."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_ENDS_AFTER_S))


def _check_global_batch_size(
    global_batch_size: int, local_batch_size: int, num_ranks: int, sequences: TrainSequences
) -> None:
    per_micro_step = num_ranks * local_batch_size
    if global_batch_size % per_micro_step:
        raise ConfigError(
            f"[training] global_batch_size = {global_batch_size}: expected a multiple of ranks x "
            f"local_batch_size = {num_ranks} x {local_batch_size} = {per_micro_step}"
        )
    if len(sequences) < global_batch_size:
        raise CorpusError(
            f"[training] global_batch_size = {global_batch_size}: the training split has "
            f"{len(sequences):,} sequences of {sequences.seq_len} tokens, fewer than one global "
            "batch; lower it, lower [data] seq_len or use a larger corpus"
        )


def _steps(
    loader: StatefulDataLoader[Batch], order: _RankOrder, micro_batches: int
) -> Generator[list[Batch], None, None]:
    batches = iter(loader)
    sequences = order.sequences
    epochs = sequences.epochs(order.start_step * order.global_batch_size)
    try:
        for number in order.steps():
            try:
                step = [next(batches) for _ in range(micro_batches)]
            except CorpusError as error:
                # torch puts a worker's traceback before the message.
                message = str(error).rpartition(f"{CorpusError.__name__}: ")[2]
                raise CorpusError(message) from error
            except RuntimeError:
                sequences.check_unchanged()  # a worker dies if its file is truncated
                raise
            before, epochs = epochs, sequences.epochs((number + 1) * order.global_batch_size)
            for name, old, new in zip(sequences.names, before, epochs, strict=True):
                if new > old:
                    logger.info("step %d begins epoch %d of %s", number + 1, new + 1, name)
            yield step
    finally:
        # torch ends workers when their iterator is collected. An error's traceback keeps it until
        # the process exits, which waits for workers that SIGTERM does not end.
        end_workers = getattr(batches, "_shutdown_workers", None)
        if end_workers is not None:
            end_workers()
