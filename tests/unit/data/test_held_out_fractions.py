"""The held-out fractions are those that were asked for."""

import pytest
from support.tiny_documents import write_json_lines

from switchtitan.data import DataConfig, open_corpus, plan_corpus
from switchtitan.data.held_out import is_held_out, period_of

FRACTIONS = (0.5, 0.4, 0.35, 0.3, 0.15, 0.1, 0.01)
NUM_DOCUMENTS = 200


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fractions")
    write_json_lines(folder / "texts" / "a.jsonl", [f"w{n}" for n in range(NUM_DOCUMENTS)])
    return DataConfig(
        dataset="jsonl", path=folder / "texts", vocab_size=257, cache_dir=folder / "corpora"
    )


def with_fraction(config, fraction, **more):
    return config.model_copy(update={"validation_fraction": fraction, **more})


@pytest.mark.parametrize("fraction", [*FRACTIONS, 0.02, 1 / 3])
def test_every_stretch_of_the_corpus_has_its_share(fraction):
    period = period_of(fraction)
    held_out = [is_held_out(document, period) for document in range(20_000)]
    assert held_out[0]
    for start in range(0, 20_000, 1000):
        # At most one block more or less at each end.
        assert abs(sum(held_out[start : start + 1000]) - 1000 * fraction) <= 2
    places = {document % 60 for document, is_chosen in enumerate(held_out) if is_chosen}
    assert len(places) > 50  # not always the same place of a block


def test_corpora_of_whole_periods_stay_as_they_are():
    """Their folders keep their names, so their contents must not change."""
    held_out = [document for document in range(250) if is_held_out(document, period_of(0.02))]
    assert held_out == [0, 61, 105, 180, 235]
    tested = [document for document in range(50) if is_held_out(document, period_of(0.1), first=1)]
    assert tested == [1, 17, 25, 38, 41]


@pytest.mark.parametrize("fraction", [0.3, 0.1])
def test_the_test_split_is_a_fraction_of_the_other_documents(config, fraction):
    """Documents of both splits are validation documents, so the share holds on average."""
    index = open_corpus(with_fraction(config, 0.4, test_fraction=fraction)).index
    validation, test = period_of(0.4), period_of(fraction)
    expected = sum(
        is_held_out(document, test, first=1) and not is_held_out(document, validation)
        for document in range(NUM_DOCUMENTS)
    )
    assert index.num_documents("validation") == 80
    assert index.num_documents("test") == expected
    others = [document for document in range(50_000) if not is_held_out(document, validation)]
    drawn = sum(is_held_out(document, test, first=1) for document in others)
    # Five standard deviations of a binomial distribution.
    assert abs(drawn / len(others) - fraction) < 5 * (fraction * (1 - fraction) / 30_000) ** 0.5


def test_corpora_of_rounded_fractions_are_not_found(config):
    assert plan_corpus(with_fraction(config, 0.3)).identity["held_out"]
    assert plan_corpus(with_fraction(config, 0.02, test_fraction=0.3)).identity["held_out"]
    for fraction in (None, 0.5, 0.1, 0.04, 0.02):  # never were rounded
        assert "held_out" not in plan_corpus(with_fraction(config, fraction)).identity
    folders = {plan_corpus(with_fraction(config, fraction)).folder for fraction in FRACTIONS}
    assert len(folders) == len(FRACTIONS)
