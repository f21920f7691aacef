"""Training and validation batches, independent of the numbers of ranks and workers."""

import logging
import signal
import warnings
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data.sequences import Sequences, document_ids
from switchtitan.data.tokenizer import DocumentTokenizer, TextSize, num_text_bytes
from switchtitan.errors import CorpusError

logger = logging.getLogger(__name__)

_WORKER_ENDS_AFTER_S = 600
"""After SIGTERM, if its rank has not ended it before."""


def build_train_batches(
    sequences: Sequences,
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

    Sequence i of the global batch of step t has position t * global_batch_size + i in the global
    order, on any number of ranks: resuming needs only the step. Worker processes start with the
    first item; `close()` on the iterator ends them. Raises a CorpusError if the split has fewer
    sequences than a global batch.

    Args:
        global_batch_size: sequences per optimizer step over all ranks, a multiple of `num_ranks *
            local_batch_size`.
        local_batch_size: sequences per micro-batch on one rank.
        rank, num_ranks: among the ranks that read different data.
        start_step: the first step to yield.
        num_workers: processes that prefetch; 0 reads in the calling process.
        pin_memory: for copies to a CUDA device.
    """
    per_micro_step = num_ranks * local_batch_size
    assert global_batch_size % per_micro_step == 0, "checked with the configuration"
    if len(sequences) < global_batch_size:
        raise CorpusError(
            f"[training] global_batch_size = {global_batch_size}: the training split has "
            f"{len(sequences):,} sequences of {sequences.seq_len} tokens, fewer than one global "
            "batch; lower it, lower [data] seq_len or use a larger corpus"
        )

    def micro_batches() -> Iterator[list[int]]:
        # Micro-batch m of all ranks comes before m + 1.
        for first in count(start_step * global_batch_size, per_micro_step):
            positions = first + rank * local_batch_size + np.arange(local_batch_size)
            yield sequences.ordered(seed, positions).tolist()

    with warnings.catch_warnings():
        # torchdata calls a deprecated function of torch.
        warnings.filterwarnings("ignore", message=".*set_vital.*")
        loader = StatefulDataLoader(
            sequences,
            batch_sampler=micro_batches(),
            num_workers=num_workers,
            collate_fn=partial(_collate, sequences.eos_id),
            pin_memory=pin_memory,
            # Otherwise the loader draws its workers' seed from the global generator.
            generator=torch.Generator(),
            worker_init_fn=_outlive_signals,
        )

    def steps() -> Generator[list[Batch], None, None]:
        batches = iter(loader)
        epochs = sequences.epochs(start_step * global_batch_size)
        try:
            for number in count(start_step + 1):
                step = [next(batches) for _ in range(global_batch_size // per_micro_step)]
                before, epochs = epochs, sequences.epochs(number * global_batch_size)
                for name, old, new in zip(sequences.names, before, epochs, strict=True):
                    if new > old:
                        logger.info("step %d begins epoch %d of %s", number, new + 1, name)
                yield step
        finally:
            # torch ends workers when their iterator is collected. An error's traceback keeps it
            # until the process exits, which waits for workers that SIGTERM does not end.
            if hasattr(batches, "_shutdown_workers"):
                batches._shutdown_workers()

    return steps()


def _outlive_signals(_worker: int) -> None:
    """Lets a worker read batches until its rank has stopped: batch systems, terminals and torchrun
    signal both."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_ENDS_AFTER_S))


@dataclass
class ValidationBatches:
    """A rank's batches of the first unshuffled sequences; warns if there are fewer than asked for.

    Every rank gets the same number of batches of the same shape. Padding sequences at the end have
    only `IGNORED_TARGET` targets, so sums and counts of targets do not depend on the number of
    ranks. A batch may be all padding: divide by the count over all ranks, not by its own."""

    sequences: Sequences
    num_sequences: int
    local_batch_size: int
    rank: int
    num_ranks: int
    targets: range | None = None
    """Places of those that count, among the targets of the first sequences; default: all."""

    def __post_init__(self) -> None:
        found = self.sequences.num_unshuffled
        if found < self.num_sequences:
            logger.warning(
                "the held-out split has %d of the %d sequences asked for by [evaluation] tokens or "
                "test_tokens; using all of them",
                found,
                self.num_sequences,
            )
            self.num_sequences = found

    def text_size(self, documents: DocumentTokenizer) -> TextSize:
        """Reads all sequences; returns the size of their text, over all ranks."""
        stretches = self.sequences.stretches(self.num_sequences)
        num_bytes = sum(num_text_bytes(tokens, documents) for tokens in stretches)
        return TextSize(self.num_sequences * self.sequences.seq_len, num_bytes)

    def __len__(self) -> int:
        return -(-self.num_sequences // (self.num_ranks * self.local_batch_size))

    def __iter__(self) -> Iterator[Batch]:
        seq_len = self.sequences.seq_len
        counted = self.targets or range(self.num_sequences * seq_len)
        for batch in range(len(self)):
            first = (batch * self.num_ranks + self.rank) * self.local_batch_size
            positions = first + np.arange(self.local_batch_size)
            chosen = self.sequences.ordered(None, positions.clip(max=self.num_sequences - 1))
            samples = [self.sequences[index] for index in chosen.tolist()]
            stacked = _collate(self.sequences.eos_id, samples)
            places = torch.from_numpy(positions[:, None] * seq_len + np.arange(seq_len))
            is_padding = (places < counted.start) | (places >= counted.stop)
            # Not in place: the targets of a single sequence are a view of its tokens' memory.
            targets = stacked.targets.masked_fill(is_padding, IGNORED_TARGET)
            yield stacked._replace(targets=targets)


def _collate(eos_id: int, samples: list[Tensor]) -> Batch:
    """Stacks sequences [seq + 1] into a batch; targets are the tokens shifted by one."""
    stacked = torch.stack(samples)
    tokens, targets = stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()
    return Batch(tokens=tokens, targets=targets, document_ids=document_ids(tokens, eos_id))
