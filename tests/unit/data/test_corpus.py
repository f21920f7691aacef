"""A corpus is prepared from its documents with its tokenizer, whatever stops a preparation, and is
opened complete or not at all."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from support.preparation import (
    count_encoded,
    prepare_until_the_rename,
    read_split,
    tokens_of,
    use_small_batches,
    write_documents,
)
from support.tiny_documents import make_documents, save_tokenizer, write_json_lines, write_nanogpt

from switchtitan.data import corpus as corpus_module
from switchtitan.data import prepare as prepare_module
from switchtitan.data.config import DataConfig
from switchtitan.data.corpus import (
    CorpusIndex,
    open_prepared,
    plan_corpus,
    plan_from_name,
    write_index,
)
from switchtitan.data.prepare import is_held_out, open_corpus
from switchtitan.data.sources import hub_error
from switchtitan.data.tokenizer import fetch_tokenizer, read_tokenizer, train_tokenizer
from switchtitan.errors import CorpusError


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 301},
        {"tokenizer": "t5-base", "vocab_size": None},
        {"max_documents": 50},
        {"max_bytes": 3000},
        {"validation_fraction": 0.2},
        {"test_fraction": 0.2},
        {"bos": False},
    ],
)
def test_what_determines_the_tokens_determines_the_folder(jsonl_config, change):
    folder = plan_from_name(jsonl_config).folder
    assert plan_from_name(jsonl_config.model_copy(update=change)).folder != folder
    unrelated = {"seq_len": 99, "num_workers": 0}
    assert plan_from_name(jsonl_config.model_copy(update=unrelated)).folder == folder


def test_a_trained_tokenizer_round_trips_any_string(documents):
    tokenizer = train_tokenizer(documents, 300)
    assert 257 <= tokenizer.vocab_size <= 300
    for text in [*documents, "unseen \x00 ★ Ж\r\n\t  end", "<|endoftext|> in a text"]:
        (ids,) = tokenizer.encode_documents([text])
        assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.eos_id not in ids
    # The same on every machine.
    assert tokenizer.sha256.startswith("00171497b17fa0b0")


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>"])
def test_documents_begin_as_the_tokenizer_begins_a_text_or_as_bos_says(tmp_path, template):
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<s>", template=template)
    for bos, start in ((None, [4]), (True, [4]), (False, [])):
        texts = ["a b", "b"] * 9
        corpus = open_corpus(write_documents(tmp_path, texts, tokenizer=str(file), bos=bos))
        # The first document is held out.
        assert tokens_of(corpus, "train")[: 2 * len(start) + 5] == [*start, 2, 3, *start, 1, 2, 3]
        documents = corpus.tokenizer()
        assert documents.bos_ids == start
        assert documents.encode_documents(["a b"]) == [[*start, 1, 2]]
        assert documents.tokenizer.encode("a b").ids[: len(start) + 2] == [*start, 1, 2]
        assert read_tokenizer(corpus.folder).sha256 == corpus.index.tokenizer.sha256
    with pytest.raises(CorpusError, match=r"\[data\] bos = true: .* no token before a text"):
        open_corpus(write_documents(tmp_path, texts, vocab_size=258, bos=True))


def test_a_corpus_of_an_earlier_version_has_documents_that_begin_with_nothing(tmp_path):
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<s>", template="<s> $A")
    config = write_documents(tmp_path, ["a b", "b"] * 9, tokenizer=str(file))
    folder = open_corpus(config).folder
    index = json.loads((folder / "index.json").read_text())
    del index["tokenizer"]["bos"]
    write_index(folder, CorpusIndex.model_validate_json(json.dumps(index)))
    assert open_prepared(folder).tokenizer().bos_ids == []
    with pytest.raises(CorpusError, match=f"earlier version prepared it.*delete {folder}"):
        open_corpus(config)


def test_no_document_of_token_ids_begins_with_a_token_unless_bos_says_so(tmp_path):
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<s>", template="<s> $A")
    write_nanogpt(tmp_path / "bin" / "a.bin", [[1, 2]] * 60, eos_id=3)
    keys = {"dataset": "nanogpt", "path": tmp_path / "bin", "tokenizer": str(file)}
    corpus = open_corpus(DataConfig(**keys, cache_dir=tmp_path / "out"))
    assert corpus.tokenizer().bos_ids == []


@pytest.mark.usefixtures("offline")
def test_the_end_token_is_found_in_one_way_however_the_tokenizer_is_named(tmp_path, monkeypatch):
    """In the local cache of the hub, in a folder, and in a prepared corpus."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    folder = repository / "snapshots" / "1111aaaa"
    save_tokenizer(folder / "tokenizer.json", "</s>", "<stop>", template="$A <stop>")
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1111aaaa")
    for tokenizer in ("owner/name", str(folder)):
        corpus = open_corpus(write_documents(tmp_path, ["a b", "b"] * 9, tokenizer=tokenizer))
        assert corpus.index.tokenizer.eos_token == "<stop>"
        documents = read_tokenizer(corpus.folder)
        assert documents.eos_token == "<stop>"
        # The template's end is no part of a document, nor of a prompt.
        assert (documents.bos_ids, documents.encode_documents(["a b"])) == ([], [[1, 2]])


def test_a_stopped_preparation_of_files_that_have_changed_starts_over(tmp_path, monkeypatch):
    prepare_until_the_rename(write_documents(tmp_path, ["aaaa"] * 40, vocab_size=260))
    config = write_documents(tmp_path, ["bbbb"] * 40, vocab_size=260)
    assert set(read_split(open_corpus(config), "train")) == {"bbbb"}


def test_changed_files_of_equal_sizes_are_not_those_of_a_corpus(tmp_path):
    write_json_lines(tmp_path / "in" / "b.jsonl", ["aaaa"] * 40)
    config = write_documents(tmp_path, ["aaaa"] * 40, vocab_size=260, max_documents=20)
    corpus = open_corpus(config)
    write_json_lines(tmp_path / "in" / "b.jsonl", ["bbbb"] * 40)  # was not read
    assert open_corpus(config).fingerprint == corpus.fingerprint
    write_json_lines(tmp_path / "in" / "a.jsonl", ["bbbb"] * 40)
    with pytest.raises(CorpusError, match=r"\[data\] path = .* a.jsonl: missing, new or changed"):
        open_corpus(config)
    # Of another size, they are another corpus.
    write_json_lines(tmp_path / "in" / "a.jsonl", ["bbbbb"] * 40)
    assert plan_from_name(config).folder != corpus.folder


@pytest.mark.usefixtures("offline")
def test_a_damaged_unknown_or_endless_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match="cannot be read"):
        read_tokenizer(tmp_path)
    with pytest.raises(CorpusError, match="no end-of-document token"):
        read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "[SEP]"))
    with pytest.raises(CorpusError, match="tokenizer = 'no-such/tokenizer'"):
        fetch_tokenizer("no-such/tokenizer")


@pytest.mark.parametrize("fraction", [None, 0.1])
def test_each_document_is_in_exactly_one_split(corpus, elsewhere, documents, fraction):
    found = open_corpus(elsewhere.model_copy(update={"test_fraction": fraction}))
    train, held_out, *tested = (read_split(found, split) for split in found.index.splits)
    assert len(tested) == (0 if fraction is None else 1)
    others = list(itertools.chain(held_out, *tested))
    assert sorted(train + others) == sorted(documents)
    assert train == [text for text in documents if text not in others]
    # A tenth of 120; the standard deviation of independent draws is 3.3.
    assert all(2 <= len(part) <= 30 for part in (held_out, *tested))
    assert held_out == read_split(corpus, "validation")


def test_the_tokenizer_is_trained_on_training_documents_only(corpus, documents):
    expected = train_tokenizer(read_split(corpus, "train"), 300)
    assert corpus.index.tokenizer.sha256 == expected.sha256
    assert train_tokenizer(documents, 300).sha256 != expected.sha256


def test_a_stop_before_the_rename_leaves_nothing_that_looks_complete(
    elsewhere, monkeypatch, corpus
):
    with monkeypatch.context() as patched:
        use_small_batches(patched)
        unfinished = prepare_until_the_rename(elsewhere)
    assert not plan_corpus(elsewhere).folder.is_dir()
    (unfinished / "progress.json").write_text('{"segments": "many"}')
    again = open_corpus(elsewhere)
    assert again.index == corpus.index
    names = {"index.json", "index.json.sha256", "tokenizer.json"}
    names |= {"train-00000.bin", "validation-00000.bin"}
    assert {file.name for file in again.folder.iterdir()} == names


def test_caps_limit_documents_and_bytes(elsewhere, documents):
    def num_documents(**keys):
        index = open_corpus(elsewhere.model_copy(update=keys)).index
        return sum(index.num_documents(split) for split in index.splits)

    assert num_documents(max_documents=31) == 31
    sizes = [len(document.encode()) for document in documents]
    assert num_documents(max_bytes=sum(sizes[:40]) + 1) == 41


@pytest.mark.parametrize(("ids_from", "dtype"), [(0, "uint16"), (70_000, "uint32")])
def test_token_ids_are_kept_with_their_own_splits(tmp_path, ids_from, dtype):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", "</s>", ids_from=ids_from)
    eos = read_tokenizer(tokenizer).eos_id
    ids = [[ids_from + token % 3 for token in range(length)] for length in range(1, 40)]
    for name, part in (("train", ids), ("val", ids[:9])):
        write_nanogpt(tmp_path / "bin" / f"{name}.bin", part, eos, dtype)
    keys = {"dataset": "nanogpt", "path": tmp_path / "bin", "tokenizer": str(tokenizer)}
    config = DataConfig(**keys, cache_dir=tmp_path / "corpora")
    corpus = open_corpus(config)
    assert corpus.index.dtype == dtype
    for split, part in (("train", ids), ("validation", ids[:9])):
        assert tokens_of(corpus, split) == [t for document in part for t in (*document, eos)]
    with pytest.raises(CorpusError, match=r"validation_fraction = 0\.1"):
        open_corpus(DataConfig(**keys, cache_dir=tmp_path / "others", validation_fraction=0.1))


def test_empty_documents_and_lone_surrogates_are_harmless(tmp_path):
    texts = ["one", "", "t\ud800wo", "three", ""] * 9
    corpus = open_corpus(write_documents(tmp_path, texts, vocab_size=257))
    found = read_split(corpus, "validation") + read_split(corpus, "train")
    assert sorted(found) == sorted(["one", "t?wo", "three"] * 9)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dataset": "text"}, "needs path"),
        ({"dataset": "nanogpt", "path": "bin"}, "needs tokenizer"),
        (
            {"dataset": "jsonl", "path": "one"},
            "for train: 1 found, all in validation; at least 2",
        ),
        ({"dataset": "jsonl", "path": "one", "cache_dir": "one/a.jsonl/corpora"}, "cache_dir = "),
    ],
)
def test_what_cannot_be_prepared_is_refused(tmp_path, monkeypatch, keys, words):
    monkeypatch.chdir(tmp_path)
    write_json_lines(tmp_path / "one" / "a.jsonl", ["the only one"])
    with pytest.raises((CorpusError, ValidationError), match=words):
        open_corpus(DataConfig(**{"cache_dir": "corpora", **keys}))


def test_long_held_out_documents_keep_their_beginning(elsewhere, corpus, monkeypatch):
    monkeypatch.setattr(prepare_module, "HELD_OUT_DOCUMENT_TOKENS", 30)
    cut = open_corpus(elsewhere)
    assert read_split(cut, "train") == read_split(corpus, "train")
    pairs = list(zip(read_split(cut, "validation"), read_split(corpus, "validation"), strict=True))
    encode = corpus.tokenizer().encode_documents
    assert encode([after for after, _ in pairs]) == [
        ids[:29] for ids in encode([before for _, before in pairs])
    ]
    assert 0 < sum(after != before for after, before in pairs) < len(pairs)


@pytest.mark.parametrize("fraction", [0.5, 0.4, 0.35, 0.3, 0.15, 0.1, 0.01, 0.02, 1 / 3])
def test_every_stretch_of_the_corpus_has_its_share_held_out(fraction):
    held_out = [is_held_out(document, fraction) for document in range(20_000)]
    assert held_out[0]
    for start in range(0, 20_000, 1000):
        # At most one block more or less at each end.
        assert abs(sum(held_out[start : start + 1000]) - 1000 * fraction) <= 2
    places = {document % 60 for document, is_chosen in enumerate(held_out) if is_chosen}
    assert len(places) > 50  # not always the same place of a block


def test_the_held_out_documents_of_a_fraction_never_change():
    held_out = [document for document in range(250) if is_held_out(document, 0.02)]
    assert held_out == [0, 61, 105, 180, 235]
    tested = [document for document in range(50) if is_held_out(document, 0.1, first=1)]
    assert tested == [1, 17, 25, 38, 41]


@pytest.fixture
def commit(tmp_path, monkeypatch):
    """Makes a commit of the only repository on the hub."""
    import datasets

    newest = SimpleNamespace(sha=None)

    def make(revision, texts):
        for split, part in (("train", texts), ("validation", texts[:5])):
            write_json_lines(tmp_path / revision / f"{split}.json.gz", part)
        newest.sha = revision

    def read_commits(function):
        def call(_, /, *arguments, revision, **keys):
            return function(str(tmp_path / revision), *arguments, **keys)

        monkeypatch.setattr(datasets, function.__name__, call)

    read_commits(datasets.load_dataset)
    read_commits(datasets.get_dataset_split_names)
    monkeypatch.setattr(corpus_module, "hub_error", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_: newest)
    return make


def test_a_preparation_resumes_after_its_last_segment_with_the_commit_it_began_with(
    commit, tmp_path, monkeypatch
):
    old, new = make_documents(60, seed=4), make_documents(60, seed=5)
    commit("1111aaaa", old)
    keys = {"dataset": "hub", "path": "owner/name", "vocab_size": 280}
    config = DataConfig(**keys, cache_dir=tmp_path / "corpora")
    use_small_batches(monkeypatch, num_documents=3)
    with monkeypatch.context() as patched:
        count_encoded(patched, stop_after=14)  # in the sixth segment
        with pytest.raises(KeyboardInterrupt):
            open_corpus(config)
    commit("2222bbbb", new)
    with monkeypatch.context() as patched:
        encoded = count_encoded(patched)
        corpus = open_corpus(config)
    finished = corpus.index.splits["train"][:5]
    assert sum(encoded) == 60 + 5 - sum(shard.documents for shard in finished)
    assert (corpus.index.revision, read_split(corpus, "train")) == ("1111aaaa", old)
    assert corpus.index.num_documents("validation") == 5
    # A preparation that begins now reads the newest commit into a folder of the same name.
    newest = open_corpus(DataConfig(**keys, cache_dir=tmp_path / "others"))
    assert (newest.index.revision, read_split(newest, "train")) == ("2222bbbb", new)
    assert newest.folder.name == corpus.folder.name


IN_A_MIXTURE = ({"dataset": "pystdlib", "weight": 1}, {"dataset": "c4", "weight": 1})


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset": "c4", "tokenizer": "t5-base"},
        # A mixture has no offline corpus.
        {"sources": IN_A_MIXTURE, "offline_dataset": "pystdlib", "max_bytes": 50_000},
    ],
)
@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_an_error_that_says_why(tmp_path, keys):
    with pytest.raises(CorpusError, match=r"HF_HUB_OFFLINE.*offline_dataset"):
        open_corpus(DataConfig(**keys, cache_dir=tmp_path))
    assert not list(tmp_path.glob("c4-*"))


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset": "c4", "tokenizer": "t5-base"},
        {"dataset": "hub", "path": "owner/name", "bos": True},
        {"dataset": "english", "tokenizer": "no-such/name"},
    ],
)
@pytest.mark.usefixtures("offline")
def test_the_offline_corpus_takes_its_place_with_a_warning(tmp_path, caplog, keys):
    keys = {**keys, "offline_dataset": "pystdlib", "max_bytes": 50_000, "cache_dir": tmp_path}
    corpus = open_corpus(DataConfig(**keys))
    assert "REQUESTED CORPUS UNAVAILABLE" in caplog.text
    assert f"dataset = '{keys['dataset']}'" in str(corpus.fallback_for)
    assert corpus.index.name.startswith("pystdlib-")


@pytest.mark.usefixtures("offline")
def test_a_prepared_corpus_needs_no_hub(elsewhere, corpus):
    config = elsewhere.model_copy(update={"tokenizer": "some/tokenizer"})
    shutil.copytree(corpus.folder, plan_from_name(config).folder)
    assert open_corpus(config).fingerprint == corpus.fingerprint


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9: " in hub_error()


def edit(file):
    contents = bytearray(file.read_bytes())
    contents[0] ^= 1
    file.write_bytes(contents)


def truncate(file):
    os.truncate(file, file.stat().st_size - 2)


def test_the_fingerprint_covers_tokens_and_tokenizer_and_not_the_place(corpus, copy):
    index, same = corpus.index, corpus.fingerprint
    stored = json.loads((copy / "index.json").read_text())["fingerprint"]
    assert open_prepared(copy).fingerprint == stored == same
    other_tokenizer = index.tokenizer.model_copy(update={"sha256": "0" * 64})
    other_splits = index.splits | {"train": index.splits["validation"]}
    changes = {"tokenizer": other_tokenizer, "dtype": "uint32", "splits": other_splits}
    for key, value in changes.items():
        assert index.model_copy(update={key: value}).fingerprint != same


def change_index(old, new):
    def change(file):
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *itertools.product(["train-00000.bin", "tokenizer.json"], [edit, truncate, Path.unlink]),
        ("index.json", change_index('"format_version": ', '"format_version": 9')),
        ("index.json", change_index('"dtype": "uint16"', '"dtype": "uint32"')),
        # A number that neither the fingerprint nor another file holds.
        ("index.json", change_index('"eos_id": 0', '"eos_id": 1')),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(copy, name, change):
    change(copy / name)
    with pytest.raises(CorpusError, match=f"{name}: .*; delete the folder {copy}"):
        open_prepared(copy)


def test_only_sizes_of_a_large_corpus_are_compared_at_each_start(copy, monkeypatch):
    monkeypatch.setattr(corpus_module, "VERIFIED_BYTES", 0)
    edit(copy / "train-00000.bin")
    opened = open_prepared(copy)
    with pytest.raises(CorpusError, match=r"train-00000\.bin: .* checksum"):
        opened.verify(math.inf)
    truncate(copy / "train-00000.bin")
    with pytest.raises(CorpusError, match=r"train-00000\.bin: it has .* bytes"):
        open_prepared(copy)
