"""Every token is a target once an epoch, in the same order on any number of ranks and workers."""

import itertools
import multiprocessing
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_documents import make_documents, write_json_lines
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from switchtitan.contracts import IGNORED_TARGET
from switchtitan.data.config import DataConfig
from switchtitan.data.loader import ValidationBatches, build_train_batches
from switchtitan.data.prepare import open_corpus
from switchtitan.data.sequences import (
    PERIOD,
    TokenFile,
    TokenSequences,
    permute,
    schedule_of,
    sequence_index,
)
from switchtitan.data.tokenizer import (
    DocumentTokenizer,
    num_text_bytes,
    train_tokenizer,
)
from switchtitan.errors import ConfigError

EOS = 0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 64, 65, 1023, 5003])
def test_an_epoch_visits_every_sequence_once(size):
    for seed, epoch in [(0, 0), (7, 3)]:
        order = permute(np.arange(size), size, seed=seed, epoch=epoch)
        assert sorted(order.tolist()) == list(range(size))


def test_epochs_and_seeds_have_different_orders():
    orders = [sequence_index(seed, np.arange(303), 101).reshape(3, 101) for seed in (1, 2)]
    distinct = {tuple(epoch) for order in orders for epoch in order.tolist()}
    assert len(distinct) == 6
    # Independent permutations agree in one place on average; the identity is never drawn.
    assert all((np.asarray(epoch) == np.arange(101)).sum() < 10 for epoch in distinct)


def write_shards(folder, tokens, cuts=(), dtype="uint16"):
    pieces = np.split(tokens, cuts)
    files = [folder / f"{number}.bin" for number in range(len(pieces))]
    for file, piece in zip(files, pieces, strict=True):
        piece.astype(np.dtype(dtype).newbyteorder("<")).tofile(file)
    return TokenSequences([TokenFile(file, dtype, "r") for file in files], seq_len=7, eos_id=EOS)


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 65_000), ("uint32", 4_000_000_000)])
@pytest.mark.parametrize("cuts", [[], [10, 11, 30], [1, 2, 3, 4, 5, 6]])
def test_sequences_are_slices_of_the_joined_shards(tmp_path, dtype, largest, cuts):
    tokens = np.random.default_rng(0).integers(0, largest, 49)
    sequences = write_shards(tmp_path, tokens, cuts, dtype)
    assert len(sequences) == 6  # the last target of a seventh is missing
    for index in range(6):
        assert sequences[index].dtype == torch.int64
        assert sequences[index].tolist() == tokens[index * 7 : index * 7 + 8].tolist()
    with pytest.raises(IndexError):
        sequences[6]


def test_pickling_reopens_the_files_instead_of_copying_the_tokens(tmp_path):
    sequences = write_shards(tmp_path, np.arange(100_000) % 1000, [40_000])
    expected = sequences[9]
    pickled = pickle.dumps(sequences)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled)[9], expected)


@pytest.fixture(scope="module")
def sequences(corpus):
    return corpus.split("train", 13)


def global_batches(sequences, num_steps, num_ranks=1, local=2, **keys):
    """Tokens [step, sample, seq] of all ranks."""
    ranks = []
    for rank in range(num_ranks):
        sizes = {"global_batch_size": 8, "local_batch_size": local, "num_ranks": num_ranks}
        batches = build_train_batches(sequences, seed=3, rank=rank, **sizes, **keys)
        ranks.append([[batch.tokens for batch in step] for step in islice(batches, num_steps)])
        batches.close()
    return torch.stack(
        [
            # Micro-batch m of all ranks, then m + 1.
            torch.cat(list(itertools.chain.from_iterable(zip(*step, strict=True))))
            for step in zip(*ranks, strict=True)
        ]
    )


def test_targets_are_the_next_tokens_and_ids_match(sequences, corpus):
    sizes = {"global_batch_size": 8, "local_batch_size": 2, "rank": 0, "num_ranks": 1}
    batches = build_train_batches(sequences, seed=3, **sizes)
    batch = next(batches)[0]
    batches.close()
    assert batch.tokens.shape == batch.targets.shape == batch.document_ids.shape == (2, 13)
    assert (batch.tokens.dtype, batch.document_ids.dtype) == (torch.int64, torch.int32)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert not torch.equal(batch.tokens, batch.targets)
    rises = batch.document_ids.diff(dim=1) == 1
    assert torch.equal(rises, batch.tokens[:, :-1] == corpus.index.tokenizer.eos_id)


@pytest.mark.parametrize("kind", ["corpus", "mixture"])
def test_any_number_of_ranks_sees_the_same_batches_and_resumes_at_any_step(kind, request):
    sequences = request.getfixturevalue(kind).split("train", 13)
    per_epoch = len(sequences) // 8
    straight = global_batches(sequences, per_epoch + 3, 1, 8)
    for num_ranks, local in ((1, 4), (2, 2), (4, 2), (4, 1)):
        assert torch.equal(global_batches(sequences, 5, num_ranks, local), straight[:5])
        for start in (6, per_epoch):
            resumed = global_batches(sequences, 3, num_ranks, local, start_step=start)
            assert torch.equal(resumed, straight[start : start + 3])


def test_workers_change_no_batch_and_end_on_close(sequences):
    before = len(multiprocessing.active_children())
    state = torch.random.get_rng_state()
    expected = global_batches(sequences, 7)
    assert torch.equal(global_batches(sequences, 7, num_workers=2), expected)
    assert len(multiprocessing.active_children()) == before
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("num_ranks", "local"), [(1, 3), (2, 3), (4, 2), (3, 5), (4, 1)])
def test_validation_counts_each_target_once_on_any_number_of_ranks(sequences, num_ranks, local):
    sizes = {"num_sequences": 7, "local_batch_size": local, "num_ranks": num_ranks}
    ranks = [ValidationBatches(sequences, rank=rank, **sizes) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    everything = [batch for batches in ranks for batch in batches]
    assert {batch.tokens.shape for batch in everything} == {(local, 13)}
    targets = torch.cat([batch.targets for batch in everything]).flatten()
    expected = torch.cat([sequences[index][1:] for index in range(7)])
    assert sorted(targets[targets != IGNORED_TARGET].tolist()) == sorted(expected.tolist())
    for batch in everything:
        assert int(batch.tokens.min()) >= 0
        counted = batch.targets != IGNORED_TARGET
        assert torch.equal(counted.all(dim=1), counted.any(dim=1))


def test_validation_can_be_iterated_again_and_warns_if_short(sequences, caplog):
    sizes = {"num_sequences": 10_000_000, "local_batch_size": 5, "rank": 0, "num_ranks": 1}
    batches = ValidationBatches(sequences, **sizes)
    assert f"has {len(sequences)} of the " in caplog.text
    assert batches.num_sequences == len(sequences)
    assert torch.equal(next(iter(batches)).tokens, next(iter(batches)).tokens)


WEIGHTS = (5.0, 3.0, 2.0)
SEQ_LEN = 11


@pytest.fixture(scope="module")
def mixture_config(tmp_path_factory):
    """Three sources of very different sizes; the last one is read several times."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, count in enumerate((300, 120, 30)):
        write_json_lines(folder / f"s{number}" / "a.jsonl", make_documents(count, seed=number + 5))
    sources = [
        {"dataset": "jsonl", "path": str(folder / f"s{number}"), "weight": weight}
        for number, weight in enumerate(WEIGHTS)
    ]
    keys = {"vocab_size": 300, "cache_dir": folder / "corpora", "validation_fraction": 0.1}
    return DataConfig(sources=sources, **keys)


@pytest.fixture(scope="module")
def mixture(mixture_config):
    return open_corpus(mixture_config)


def test_each_source_has_its_share_and_is_read_in_epochs(mixture):
    mixed = mixture.split("train", SEQ_LEN)
    sizes = [len(source.split("train", SEQ_LEN)) for source in mixture.sources]
    num_positions = 4 * len(mixed)
    indices = mixed.ordered(3, np.arange(num_positions))
    sources = np.searchsorted(np.cumsum(sizes), indices, side="right")
    for source, (weight, size) in enumerate(zip(WEIGHTS, sizes, strict=True)):
        own = indices[sources == source]
        assert abs(len(own) - weight / 10 * num_positions) <= 1
        epochs = len(own) // size
        assert mixed.epochs(num_positions)[source] == epochs
        for epoch in range(epochs):
            assert len(set(own[epoch * size : (epoch + 1) * size].tolist())) == size
    assert mixed.epochs(num_positions)[2] >= 5


def test_held_out_sequences_of_a_mixture_are_in_their_shares_until_the_first_source_ends(mixture):
    held_out = mixture.split("validation", SEQ_LEN)
    parts = [source.split("validation", SEQ_LEN) for source in mixture.sources]
    num_sequences, sizes = held_out.num_unshuffled, list(map(len, parts))
    shares = schedule_of(WEIGHTS).num_given(num_sequences)
    assert all(share <= size for share, size in zip(shares, sizes, strict=True))
    beyond = schedule_of(WEIGHTS).num_given(num_sequences + 1)
    assert any(share > size for share, size in zip(beyond, sizes, strict=True))
    expected = [
        part[index].tolist()
        for part, share in zip(parts, shares, strict=True)
        for index in range(share)
    ]
    batch_of = {"num_sequences": 10**6, "local_batch_size": 1, "rank": 0, "num_ranks": 1}
    batches = ValidationBatches(held_out, **batch_of)
    found = [[*batch.tokens[0].tolist(), int(batch.targets[0, -1])] for batch in batches]
    assert sorted(found) == sorted(expected)
    assert sum(len(stretch) - 1 for stretch in held_out.stretches(5)) == 5 * SEQ_LEN


def test_weights_and_tokenizer_are_in_the_fingerprint_of_a_mixture(mixture_config, mixture):
    assert len({source.index.tokenizer.sha256 for source in mixture.sources}) == 1
    assert open_corpus(mixture_config).fingerprint == mixture.fingerprint
    first, *others = mixture_config.sources
    heavier = first.model_copy(update={"weight": 6.0})
    changed = mixture_config.model_copy(update={"sources": (heavier, *others)})
    assert open_corpus(changed).fingerprint != mixture.fingerprint


@given(st.lists(st.integers(1, 500), min_size=1, max_size=7), st.integers(0, 3 * PERIOD))
@settings(max_examples=10, deadline=None)
def test_counts_are_within_one_of_their_share(weights, position):
    schedule = schedule_of([float(weight) for weight in weights])
    assert sum(schedule.counts) == PERIOD
    given_counts = schedule.num_given(position)
    assert sum(given_counts) == position
    for count, number, weight in zip(schedule.counts, given_counts, weights, strict=True):
        assert abs(number - count * position / PERIOD) < 1
        assert abs(count / PERIOD - weight / sum(weights)) < 1 / PERIOD


def test_a_weight_that_rounds_to_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"sources\[1\]\.weight = 1e-06"):
        schedule_of([1.0, 1e-6])


TEXTS = ["größe = 5 €", "日本語 and more", "</s> in a text", ""]


def words_tokenizer():
    alphabet = sorted(set("".join(TEXTS)) - {" "})
    vocabulary = {piece: index for index, piece in enumerate(["</s>", "▁", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return DocumentTokenizer(tokenizer, "</s>")


@pytest.mark.parametrize("kind", ["byte-level", "words"])
def test_the_bytes_of_tokens_are_those_of_the_text_for_any_part(kind):
    is_byte_level = kind == "byte-level"
    tokenizer = train_tokenizer([*TEXTS, *TEXTS], 290) if is_byte_level else words_tokenizer()
    stream = [tokenizer.eos_id]
    for ids in tokenizer.encode_documents(TEXTS):
        stream += [*ids, tokenizer.eos_id]
    stream = np.array(stream)
    num_bytes = num_text_bytes(stream, tokenizer)
    assert num_bytes == sum(len(text.encode()) for text in TEXTS)
    # The last token of a part is the first one of the next, where it is not counted. A text that
    # starts with a word has no space before it.
    for cut in range(1, len(stream)):
        if is_byte_level or stream[cut] == tokenizer.eos_id:
            parts = stream[: cut + 1], stream[cut:]
            assert sum(num_text_bytes(part, tokenizer) for part in parts) == num_bytes
