import multiprocessing
from itertools import islice

import pytest
import torch

from switchtitan.contracts import IGNORED_TARGET, Batch
from switchtitan.data import Corpus, TokenSequences, build_train_batches, build_validation_batches
from switchtitan.errors import ConfigError, CorpusError


@pytest.fixture(scope="module")
def sequences(corpus: Corpus) -> TokenSequences:
    return corpus.split("train", 13)


def steps(
    sequences: TokenSequences,
    count: int,
    rank: int = 0,
    num_ranks: int = 1,
    local: int = 2,
    **settings: int,
) -> list[list[Batch]]:
    batches = build_train_batches(
        sequences,
        seed=3,
        global_batch_size=8,
        local_batch_size=local,
        rank=rank,
        num_ranks=num_ranks,
        **settings,
    )
    taken = list(islice(batches, count))
    batches.close()
    return taken


def equal(ours: list[list[Batch]], theirs: list[list[Batch]]) -> bool:
    pairs = [
        (x, y)
        for a, b in zip(ours, theirs, strict=True)
        for m, n in zip(a, b, strict=True)
        for x, y in zip(m, n, strict=True)
    ]
    return all(torch.equal(x, y) for x, y in pairs)


def global_batches(sequences: TokenSequences, num_ranks: int, local: int) -> torch.Tensor:
    """Returns tokens [step, sample, seq] of all ranks."""
    ranks = [steps(sequences, 5, rank, num_ranks, local) for rank in range(num_ranks)]
    return torch.stack(
        [
            torch.cat(
                [
                    ranks[rank][step][m].tokens
                    for m in range(len(ranks[0][0]))
                    for rank in range(num_ranks)
                ]
            )
            for step in range(5)
        ]
    )


def test_targets_are_the_next_tokens_and_ids_match(
    sequences: TokenSequences, corpus: Corpus
) -> None:
    batch = steps(sequences, 1)[0][0]
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (2, 13)
    assert (batch.tokens.dtype, batch.document_ids.dtype) == (torch.int64, torch.int32)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    rises = batch.document_ids.diff(dim=1) == 1
    assert torch.equal(rises, batch.tokens[:, :-1] == corpus.eos_id)


@pytest.mark.parametrize(("num_ranks", "local"), [(1, 4), (2, 2), (4, 2), (2, 1), (4, 1)])
def test_any_number_of_ranks_sees_the_same_global_batches(
    sequences: TokenSequences, num_ranks: int, local: int
) -> None:
    assert torch.equal(global_batches(sequences, num_ranks, local), global_batches(sequences, 1, 8))


def test_resuming_at_a_step_equals_the_uninterrupted_run(sequences: TokenSequences) -> None:
    straight = steps(sequences, 9)
    assert equal(straight[6:], steps(sequences, 3, start_step=6))


def test_a_run_continues_after_the_end_of_an_epoch(sequences: TokenSequences) -> None:
    per_epoch = len(sequences) // 8
    straight = steps(sequences, per_epoch + 3)
    seen = torch.cat([batch.tokens for step in straight[:per_epoch] for batch in step])
    assert len(seen) == per_epoch * 8
    assert equal(straight[per_epoch:], steps(sequences, 3, start_step=per_epoch))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_no_batch_and_end_on_close(
    sequences: TokenSequences, num_workers: int
) -> None:
    before = len(multiprocessing.active_children())
    state = torch.random.get_rng_state()
    assert equal(steps(sequences, 7, num_workers=num_workers), steps(sequences, 7))
    assert len(multiprocessing.active_children()) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_global_batch_that_cannot_be_divided_or_filled_is_refused(
    sequences: TokenSequences,
) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size = 8: .* multiple of .* 2 x 3 = 6"):
        steps(sequences, 1, num_ranks=2, local=3)
    with pytest.raises(CorpusError, match="fewer than one global batch"):
        build_train_batches(
            sequences, seed=0, global_batch_size=4096, local_batch_size=1, rank=0, num_ranks=1
        )


@pytest.mark.parametrize(("num_ranks", "local"), [(1, 3), (2, 3), (4, 2), (3, 5), (4, 1)])
def test_validation_counts_each_target_once_on_any_number_of_ranks(
    sequences: TokenSequences, num_ranks: int, local: int
) -> None:
    ranks = [
        build_validation_batches(
            sequences, num_sequences=7, local_batch_size=local, rank=rank, num_ranks=num_ranks
        )
        for rank in range(num_ranks)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    everything = [batch for batches in ranks for batch in batches]
    assert {batch.tokens.shape for batch in everything} == {(local, 13)}
    targets = torch.cat([batch.targets for batch in everything]).flatten()
    expected = torch.cat([sequences[index].tokens[1:] for index in range(7)])
    assert sorted(targets[targets != IGNORED_TARGET].tolist()) == sorted(expected.tolist())
    for batch in everything:
        assert int(batch.tokens.min()) >= 0
        counted = batch.targets != IGNORED_TARGET
        assert torch.equal(counted.all(dim=1), counted.any(dim=1))


def test_validation_can_be_iterated_again_and_warns_if_short(
    sequences: TokenSequences, caplog: pytest.LogCaptureFixture
) -> None:
    batches = build_validation_batches(
        sequences, num_sequences=10_000_000, local_batch_size=5, rank=0, num_ranks=1
    )
    assert f"has {len(sequences)} of the " in caplog.text
    assert batches.num_sequences == len(sequences)
    first, again = next(iter(batches)), next(iter(batches))
    assert torch.equal(first.tokens, again.tokens)
