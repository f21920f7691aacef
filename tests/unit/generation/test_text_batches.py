"""Every token of a text that is evaluated is a target once, on any number of ranks."""

import itertools

import pytest

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.generation.held_out import text_batches

STREAM = [1, 40, 5, 6, 7, 1, 8, 9, 10, 11, 12, 13, 1, 14]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("seq_len", [2, 3, 5, 13, 20])
@pytest.mark.parametrize("num_context", [1, 2])
def test_every_token_of_a_text_after_the_context_is_a_target_once(num_ranks, seq_len, num_context):
    keys = {"num_context": num_context, "seq_len": seq_len, "eos_id": 1, "local_batch_size": 2}
    batches = [text_batches(STREAM, rank=r, num_ranks=num_ranks, **keys) for r in range(num_ranks)]
    assert len({len(own) for own in batches}) == 1
    pairs = []
    for batch in itertools.chain.from_iterable(zip(*batches, strict=True)):
        assert batch.tokens.shape == batch.document_ids.shape == (2, seq_len)
        flat = zip(batch.tokens.flatten().tolist(), batch.targets.flatten().tolist(), strict=True)
        pairs += [pair for pair in flat if pair[1] != IGNORED_TARGET]
    assert pairs == list(itertools.pairwise(STREAM))[num_context - 1 :]


def test_documents_of_a_text_are_told_apart():
    keys = {"num_context": 1, "seq_len": 7, "eos_id": 1, "local_batch_size": 2}
    (batch,) = text_batches(STREAM, rank=0, num_ranks=1, **keys)
    assert batch.document_ids.tolist()[0] == [0, 1, 1, 1, 1, 1, 2]
