"""Mixtures of sources: the same batches on any number of ranks, in the shares of the weights."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.smallest import SMALLEST
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.config.section import Section
from switchtitan.config.toml_text import resolved_toml
from switchtitan.data import (
    Corpus,
    DataConfig,
    build_train_batches,
    build_validation_batches,
    open_corpus,
)
from switchtitan.data.mixture import PERIOD, Schedule, schedule_of
from switchtitan.errors import ConfigError, CorpusError
from switchtitan.job.config import parse_arguments

REST = SMALLEST.format(folder="outputs/a")
WEIGHTS = (5.0, 3.0, 2.0)
SEQ_LEN = 11


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Three sources of very different sizes; the last one is read several times."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, count in enumerate((300, 120, 30)):
        write_json_lines(folder / f"s{number}" / "a.jsonl", make_documents(count, seed=number + 5))
    sources = [
        {"dataset": "jsonl", "path": str(folder / f"s{number}"), "weight": weight}
        for number, weight in enumerate(WEIGHTS)
    ]
    return DataConfig.model_validate(
        {"sources": sources, "vocab_size": 300, "cache_dir": folder / "corpora"}
        | {"validation_fraction": 0.1}
    )


@pytest.fixture(scope="module")
def corpus(config: DataConfig) -> Corpus:
    return open_corpus(config, show_progress=False)


def batches_of(
    corpus: Corpus, num_steps: int, num_ranks: int, start_step: int = 0, num_workers: int = 0
) -> torch.Tensor:
    """Tokens [step, sample, seq] of all ranks."""
    ranks = []
    for rank in range(num_ranks):
        batches = build_train_batches(
            corpus.train_split(SEQ_LEN),
            seed=3,
            global_batch_size=8,
            local_batch_size=2,
            rank=rank,
            num_ranks=num_ranks,
            start_step=start_step,
            num_workers=num_workers,
        )
        ranks.append(list(islice(batches, num_steps)))
        batches.close()
    return torch.stack(
        [
            torch.cat(
                [
                    ranks[rank][step][micro].tokens
                    for micro in range(8 // (2 * num_ranks))
                    for rank in range(num_ranks)
                ]
            )
            for step in range(num_steps)
        ]
    )


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_sees_the_same_batches(corpus: Corpus, num_ranks: int) -> None:
    assert torch.equal(batches_of(corpus, 60, num_ranks), batches_of(corpus, 60, 1))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_resume_on_another_number_of_ranks_goes_on_with_the_next_batch(
    corpus: Corpus, num_ranks: int
) -> None:
    straight = batches_of(corpus, 60, 1)
    resumed = batches_of(corpus, 23, num_ranks, start_step=37)
    assert torch.equal(resumed, straight[37:])
    assert not torch.equal(resumed, straight[36:59])


def test_workers_change_no_batch(corpus: Corpus) -> None:
    assert torch.equal(batches_of(corpus, 9, 1, num_workers=2), batches_of(corpus, 9, 1))


def test_each_source_has_its_share_and_is_read_in_epochs(corpus: Corpus) -> None:
    mixed = corpus.train_split(SEQ_LEN)
    sizes = [len(source.split("train", SEQ_LEN)) for source in corpus.sources]
    ends = np.cumsum(sizes)
    num_positions = 4 * len(mixed)
    indices = mixed.ordered(3, np.arange(num_positions))
    sources = np.searchsorted(ends, indices, side="right")
    for source, (weight, size) in enumerate(zip(WEIGHTS, sizes, strict=True)):
        own = indices[sources == source]
        assert abs(len(own) - weight / 10 * num_positions) <= 1
        epochs = len(own) // size
        assert mixed.epochs(num_positions)[source] == epochs
        for epoch in range(epochs):
            assert len(set(own[epoch * size : (epoch + 1) * size].tolist())) == size
    assert mixed.epochs(num_positions)[2] >= 5


def test_the_start_of_an_epoch_is_logged(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="switchtitan.data.loader")
    smallest = corpus.sources[2]
    per_epoch = len(smallest.split("train", SEQ_LEN)) * 10 // 2  # positions, at a share of 0.2
    batches_of(corpus, per_epoch // 8 + 2, 1)
    assert f"begins epoch 2 of {smallest.name}" in caplog.text


def test_held_out_sequences_have_the_same_shares_and_come_once(corpus: Corpus) -> None:
    held_out = corpus.held_out_split("validation", SEQ_LEN)
    sizes = [len(source.split("validation", SEQ_LEN)) for source in corpus.sources]
    schedule = schedule_of(WEIGHTS)
    given = schedule.num_given(len(held_out))
    assert all(number <= size for number, size in zip(given, sizes, strict=True))
    beyond = schedule.num_given(len(held_out) + 1)
    assert any(number > size for number, size in zip(beyond, sizes, strict=True))
    tokens = [tuple(held_out[index].tokens.tolist()) for index in range(len(held_out))]
    expected = [
        tuple(source.split("validation", SEQ_LEN)[index].tokens.tolist())
        for source, number in zip(corpus.sources, given, strict=True)
        for index in range(number)
    ]
    assert sorted(tokens) == sorted(expected)
    batches = build_validation_batches(
        held_out, num_sequences=5, local_batch_size=2, rank=0, num_ranks=1
    )
    assert len(list(batches)) == 3
    stretches = list(held_out.stretches(5))
    assert sum(len(stretch) - 1 for stretch in stretches) == 5 * SEQ_LEN


def test_all_sources_have_the_tokenizer_of_the_first(corpus: Corpus) -> None:
    assert len({source.index.tokenizer.sha256 for source in corpus.sources}) == 1
    assert corpus.folder == corpus.sources[0].folder
    assert corpus.description.startswith("mixture of 50.00% 1 jsonl file(s)")


def test_weights_and_order_are_in_the_fingerprint(config: DataConfig, corpus: Corpus) -> None:
    assert open_corpus(config, show_progress=False).fingerprint == corpus.fingerprint
    first, *others = config.sources
    heavier = first.model_copy(update={"weight": 6.0})
    changed = config.model_copy(update={"sources": (heavier, *others)})
    assert open_corpus(changed, show_progress=False).fingerprint != corpus.fingerprint


def test_a_source_twice_is_refused(config: DataConfig) -> None:
    twice = config.model_copy(update={"sources": (*config.sources, config.sources[1])})
    with pytest.raises(CorpusError, match=r"sources\[3\]: holds the same tokens as sources\[1\]"):
        open_corpus(twice, show_progress=False)


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=7),
    st.integers(0, 3 * PERIOD),
)
@settings(max_examples=25, deadline=None)
def test_counts_are_within_one_of_their_share(weights: list[int], position: int) -> None:
    schedule = schedule_of([float(weight) for weight in weights])
    assert sum(schedule.counts) == PERIOD
    given_counts = schedule.num_given(position)
    assert sum(given_counts) == position
    for count, number, weight in zip(schedule.counts, given_counts, weights, strict=True):
        assert abs(number - count * position / PERIOD) < 1
        assert abs(count / PERIOD - weight / sum(weights)) < 1 / PERIOD


def test_a_place_in_a_source_follows_from_the_places_before() -> None:
    schedule = Schedule((5000, 3000, 2000))
    sources, places = schedule.places(np.arange(2 * PERIOD + 7))
    seen = [0, 0, 0]
    for position, (source, place) in enumerate(zip(sources.tolist(), places.tolist(), strict=True)):
        assert place == seen[source]
        assert position >= PERIOD or schedule.position_of(source, place) == position
        seen[source] += 1
    assert seen == schedule.num_given(2 * PERIOD + 7)


def test_a_weight_that_rounds_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sources\[1\]\.weight = 1e-06: expected at least"):
        schedule_of([1.0, 1e-6])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "x"}, "path = 'x' has no effect with sources"),
        ({"dataset": "c4"}, "dataset = 'c4' has no effect with sources"),
        ({"offline_dataset": "pystdlib"}, "offline_dataset = 'pystdlib' has no effect"),
        (
            {"sources": [{"dataset": "text", "weight": 1}, {"dataset": "pystdlib", "weight": 2}]},
            r"sources\[0\]: dataset = 'text' needs path",
        ),
        ({"sources": [{"dataset": "pystdlib", "weight": 0}]}, "greater than 0"),
    ],
)
def test_mistakes_are_refused(config: DataConfig, keys: dict, message: str) -> None:
    given_keys = {"sources": [source.model_dump() for source in config.sources], **keys}
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(given_keys)


def test_tables_of_a_file_are_a_mixture_and_the_saved_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    tables = """
[data]
tokenizer = "t5-base"
[[data.sources]]
dataset = "c4"
weight = 7
[[data.sources]]
dataset = "text"
path = "books"
weight = 3
"""
    file.write_text(REST + tables)
    job = parse_arguments(["--config", str(file)])
    assert [(source.dataset, source.weight) for source in job.data.sources] == [
        ("c4", 7.0),
        ("text", 3.0),
    ]
    saved = tmp_path / "config.toml"
    saved.write_text(resolved_toml(job))
    assert parse_arguments(["--config", str(saved)]) == job
    file.write_text(REST + tables.replace("weight = 3", "wieght = 3"))
    with pytest.raises(ConfigError, match="wieght"):
        parse_arguments(["--config", str(file)])


def test_the_resolved_configuration_has_the_sources(config: DataConfig) -> None:
    class Job(Section):
        data: DataConfig

    text = resolved_toml(Job(data=config))
    assert 'sources = [{ weight = 5.0, dataset = "jsonl", path = "' in text
    assert str(Path(config.sources[0].path or "")) in text
