"""Each token of a text is a target once, on any number of ranks."""

import itertools

import pytest

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.data.text_batches import TextBatches

EOS = 1
STREAM = [EOS, 40, 5, 6, 7, EOS, 8, 9, 10, 11, 12, 13, EOS, 14]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [2, 3, 5, 13, 20])
@pytest.mark.parametrize("num_context", [1, 2])
def test_every_token_after_the_context_is_a_target_once(num_ranks, seq_len, num_context):
    batches = [
        TextBatches(
            STREAM,
            num_context=num_context,
            seq_len=seq_len,
            eos_id=EOS,
            local_batch_size=2,
            rank=rank,
            num_ranks=num_ranks,
        )
        for rank in range(num_ranks)
    ]
    assert len({len(own) for own in batches}) == 1
    pairs = []
    for step in zip(*batches, strict=True):
        for batch in step:
            assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape
            assert batch.tokens.shape == (2, seq_len)
            for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
                pairs += [
                    pair for pair in zip(tokens, targets, strict=True) if pair[1] != IGNORED_TARGET
                ]
    assert pairs == list(itertools.pairwise(STREAM))[num_context - 1 :]
    assert len(pairs) == batches[0].num_targets


def test_documents_are_told_apart():
    (batch,) = TextBatches(
        STREAM, num_context=1, seq_len=7, eos_id=EOS, local_batch_size=2, rank=0, num_ranks=1
    )
    assert batch.document_ids.tolist()[0] == [0, 1, 1, 1, 1, 1, 2]
