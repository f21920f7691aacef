"""A corpus is prepared from its documents with its tokenizer, whatever stops a preparation."""

import json
import os
import shutil
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from support.preparation import (
    count_encoded,
    prepare_until_the_rename,
    read_split,
    tokens_of,
    use_small_batches,
)
from support.tiny_documents import make_documents, write_json_lines
from support.token_files import write_nanogpt
from support.word_tokenizer import save_tokenizer

from switchtitan.data import (
    DATASETS,
    DataConfig,
    open_corpus,
    plan_corpus,
)
from switchtitan.data import corpus_plan as plan_module
from switchtitan.data import prepare as prepare_module
from switchtitan.data.corpus_plan import hub_error, plan_from_name
from switchtitan.data.held_out import document_cap
from switchtitan.data.sources import SourceKeys
from switchtitan.data.tokenizer import fetch_tokenizer, read_tokenizer, train_tokenizer
from switchtitan.errors import CorpusError


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dataset": "pystdlib", "path": "x"}, "path"),
        ({"dataset": "text", "path": "x", "text_column": "body"}, "text_column"),
        ({"dataset": "c4", "validation_fraction": 0.1}, "own split"),
        ({"dataset": "c4", "test_fraction": 0.1}, "test_fraction = 0.1"),
        ({"tokenizer": "t5-base", "vocab_size": 300}, "vocab_size = 300"),
        ({"dataset": "pystdlib", "offline_dataset": "pystdlib"}, "offline_dataset"),
        ({"dataset": "jsonl", "path": "x", "hub_split": "train"}, 'hub_split = "train"'),
    ],
)
def test_a_key_without_effect_is_named(given, words):
    (message,) = DataConfig(**given).without_effect()
    assert words in message


@pytest.mark.parametrize(("dataset", "key"), [("text", "path"), ("arrow", "tokenizer")])
def test_what_a_dataset_needs_must_be_set(dataset, key):
    path = None if key == "path" else "x"
    with pytest.raises(ValidationError, match=f"needs {key}"):
        DataConfig(dataset=dataset, path=path)


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 301},
        {"tokenizer": "t5-base", "vocab_size": None},
        {"max_documents": 50},
        {"max_bytes": 3000},
        {"validation_fraction": 0.2},
        {"test_fraction": 0.2},
        {"max_document_share": 0.05},
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
    assert train_tokenizer(iter(documents), 300).sha256.startswith("00171497b17fa0b0")
    assert tokenizer.sha256.startswith("00171497b17fa0b0")


def test_documents_are_encoded_in_full_without_special_tokens(tmp_path):
    file = save_tokenizer(tmp_path / "tokenizer.json", "</s>", ids_from=70)
    tokenizer = read_tokenizer(file)
    assert tokenizer.encode_documents(["a b a b", "b"]) == [[71, 72, 71, 72], [72]]
    assert tokenizer.vocab_size == 73
    assert read_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.parametrize("setting", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_settings_next_to_the_tokenizer_name_the_end_token(tmp_path, setting):
    save_tokenizer(tmp_path / "tokenizer.json", "</s>", "<stop>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": setting}))
    assert read_tokenizer(tmp_path).eos_token == "<stop>"


def test_a_missing_damaged_unknown_or_endless_tokenizer_is_named(tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match=r"tokenizer\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CorpusError, match=r"tokenizer\.json: "):
        read_tokenizer(tmp_path)
    with pytest.raises(CorpusError, match="no end-of-document token"):
        read_tokenizer(save_tokenizer(tmp_path / "tokenizer.json", "[SEP]"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="tokenizer = 'no-such/tokenizer'"):
        fetch_tokenizer("no-such/tokenizer")


def test_each_document_is_in_exactly_one_split(corpus, documents):
    train, held_out = read_split(corpus, "train"), read_split(corpus, "validation")
    assert sorted(train + held_out) == sorted(documents)
    assert train == [text for text in documents if text not in held_out]
    # A tenth of 120; the standard deviation of independent draws is 3.3.
    assert 2 <= len(held_out) <= 30
    assert corpus.index.dtype == "uint16"


def test_the_tokenizer_is_trained_on_training_documents_only(corpus, documents):
    expected = train_tokenizer(read_split(corpus, "train"), 300)
    assert corpus.index.tokenizer.sha256 == expected.sha256
    assert train_tokenizer(documents, 300).sha256 != expected.sha256


def test_the_test_split_is_disjoint_from_the_others(elsewhere, documents, corpus):
    config = elsewhere.model_copy(update={"test_fraction": 0.1})
    with_test = open_corpus(config)
    splits = [read_split(with_test, split) for split in ("train", "validation", "test")]
    assert all(splits)
    assert sorted(chain.from_iterable(splits)) == sorted(documents)
    assert splits[1] == read_split(corpus, "validation")
    with pytest.raises(CorpusError, match=r"no test split.*test_fraction"):
        corpus.split("test", 16)


def test_segments_change_the_files_but_not_the_tokens(elsewhere, corpus, monkeypatch):
    use_small_batches(monkeypatch)
    other = open_corpus(elsewhere)
    assert len(other.index.splits["train"]) > 3
    for split in ("train", "validation"):
        assert read_split(other, split) == read_split(corpus, split)


@pytest.mark.parametrize("lost", ["progress.json", "tokenizer.json", "train-00001.bin", None])
def test_a_stop_before_the_rename_leaves_nothing_that_looks_complete(
    elsewhere, monkeypatch, lost, corpus
):
    with monkeypatch.context() as patched:
        use_small_batches(patched)
        unfinished = prepare_until_the_rename(elsewhere)
    assert not plan_corpus(elsewhere).is_prepared
    if lost is None:
        (unfinished / "progress.json").write_text('{"segments": "many"}')
    else:
        (unfinished / lost).unlink()
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
    write_json_lines(tmp_path / "in" / "a.jsonl", ["one", "", "t\ud800wo", "three", ""] * 9)
    keys = {"dataset": "jsonl", "path": tmp_path / "in", "vocab_size": 257}
    corpus = open_corpus(DataConfig(**keys, cache_dir=tmp_path / "out"))
    found = read_split(corpus, "validation") + read_split(corpus, "train")
    assert sorted(found) == sorted(["one", "t?wo", "three"] * 9)


def test_a_corpus_of_one_document_is_refused(tmp_path):
    write_json_lines(tmp_path / "a.jsonl", ["the only one"])
    keys = {"dataset": "jsonl", "path": tmp_path, "vocab_size": 257}
    with pytest.raises(CorpusError, match="no document for the"):
        open_corpus(DataConfig(**keys, cache_dir=tmp_path / "out"))


def test_errors_of_writing_are_named(elsewhere, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    blocked = elsewhere.model_copy(update={"cache_dir": tmp_path / "file" / "corpora"})
    with pytest.raises(CorpusError, match=r"cache_dir = '.*corpora'"):
        open_corpus(blocked)

    def no_space(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(prepare_module, "write_shard", no_space)
    with pytest.raises(CorpusError, match=r"the disk is full"):
        open_corpus(elsewhere)


def test_the_standard_library_can_be_prepared(tmp_path):
    corpus = open_corpus(DataConfig(cache_dir=tmp_path, vocab_size=300, max_bytes=300_000))
    assert "standard library of CPython 3." in corpus.description
    assert any("import " in text for text in read_split(corpus, "train"))


SHARE = 0.02


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Corpora with and without a cap: each seventh document has 150 times the words of others."""
    folder = tmp_path_factory.mktemp("uneven")
    counts = [300 if number % 7 == 0 else 2 for number in range(1100)]
    texts = [" ".join([f"w{number}"] * count) for number, count in enumerate(counts)]
    write_json_lines(folder / "texts" / "a.jsonl", texts)
    keys = {"dataset": "jsonl", "path": folder / "texts", "vocab_size": 300}
    keys |= {"validation_fraction": 0.1, "test_fraction": 0.1, "cache_dir": folder / "corpora"}
    capped, uncut = DataConfig(**keys), DataConfig(**keys, max_document_share=None)
    return open_corpus(capped), open_corpus(uncut)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_no_document_has_more_than_its_share(uneven, split):
    def lengths(corpus):
        encoded = corpus.tokenizer().encode_documents(read_split(corpus, split))
        return [len(ids) + 1 for ids in encoded]

    capped, uncut = uneven
    assert max(lengths(uncut)) > SHARE * sum(lengths(uncut))  # it would without a cap
    kept = lengths(capped)
    assert sum(kept) == capped.index.num_tokens(split)
    assert max(kept) <= SHARE * sum(kept)
    assert max(kept) == capped.index.document_caps[split]


def test_cut_documents_keep_their_beginning_and_training_documents_all(uneven):
    capped, uncut = uneven
    assert read_split(capped, "train") == read_split(uncut, "train")
    for split in ("validation", "test"):
        pairs = list(zip(read_split(capped, split), read_split(uncut, split), strict=True))
        assert all(before.startswith(after) for after, before in pairs)
        assert 0 < sum(after != before for after, before in pairs) < len(pairs)
        num_bytes = sum(len(after.encode()) for after, _ in pairs)
        assert capped.index.splits[split][0].bytes_of_text == num_bytes


@given(st.lists(st.integers(2, 100_000), min_size=1, max_size=100), st.floats(0.005, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_cap_is_the_largest_that_keeps_the_share(lengths, share):
    allowed = max(share, 2 / len(lengths))
    cap = document_cap(np.array(lengths), share)

    def kept(limit):
        return sum(min(length, limit) for length in lengths)

    assert cap == max(lengths) or cap + 1 > allowed * kept(cap + 1) * (1 - 1e-9)
    assert cap <= 2 or cap <= allowed * kept(cap) * (1 + 1e-9)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Commits of `owner/name` on a hub: their folders, the newest one last."""
    import datasets

    commits, load = {}, datasets.load_dataset
    names = datasets.get_dataset_split_names

    def folder(name, revision):
        assert name == "owner/name"
        return str(commits[revision or list(commits)[-1]])

    def load_dataset(path, *, revision, **keys):
        return load(folder(path, revision), **keys)

    def get_names(name, config, revision):
        return names(folder(name, revision), config)

    def dataset_info(client, name):
        return SimpleNamespace(sha=list(commits)[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan_module, "hub_error", lambda: None)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", get_names)
    return commits


def commit(hub, folder, revision, texts):
    for split, part in (("train", texts), ("validation", texts[:5])):
        write_json_lines(folder / revision / f"{split}.json.gz", part)
    files = "data_files:\n  - {split: train, path: tr*}\n  - {split: validation, path: va*}"
    readme = f"---\nconfigs:\n- config_name: default\n  {files}\n---\n"
    (folder / revision / "README.md").write_text(readme)
    hub[revision] = folder / revision


def test_a_resumed_preparation_reads_the_commit_it_began_with(hub, tmp_path, monkeypatch):
    old, new = make_documents(60, seed=4), make_documents(60, seed=5)
    commit(hub, tmp_path, "1111aaaa", old)
    keys = {"dataset": "hub", "path": "owner/name", "vocab_size": 280}
    config = DataConfig(**keys, cache_dir=tmp_path / "corpora")
    use_small_batches(monkeypatch, num_documents=3)
    with monkeypatch.context() as patched:
        count_encoded(patched, stop_after=15)
        with pytest.raises(KeyboardInterrupt):
            open_corpus(config)
    commit(hub, tmp_path, "2222bbbb", new)
    corpus = open_corpus(config)
    assert corpus.index.revision == "1111aaaa"
    assert read_split(corpus, "train") == old
    assert corpus.index.num_documents("validation") == 5
    # A preparation that begins now reads the newest commit into a folder of the same name.
    newest = open_corpus(DataConfig(**keys, cache_dir=tmp_path / "others"))
    assert (newest.index.revision, read_split(newest, "train")) == ("2222bbbb", new)
    assert newest.folder.name == corpus.folder.name


def test_a_local_copy_has_no_commit(tmp_path):
    assert DATASETS["hub"].open(SourceKeys(tmp_path, "text", "en")).repository is None


def test_a_hub_that_does_not_name_the_commit_is_an_error(hub, tmp_path, monkeypatch):
    def fail(client, name):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", fail)
    config = DataConfig(dataset="hub", path="owner/name", cache_dir=tmp_path / "corpora")
    with pytest.raises(CorpusError, match=r"path = 'owner/name'.*no route"):
        open_corpus(config)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_an_unreachable_hub_is_an_error_that_says_why(tmp_path):
    config = DataConfig(dataset="c4", tokenizer="t5-base", cache_dir=tmp_path)
    with pytest.raises(CorpusError, match=r"HF_HUB_OFFLINE.*offline_dataset"):
        open_corpus(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "keys",
    [
        {"dataset": "c4", "tokenizer": "t5-base"},
        {"dataset": "hub", "path": "owner/name"},
        {"dataset": "english", "tokenizer": "no-such/name"},
    ],
)
@pytest.mark.usefixtures("offline")
def test_the_offline_corpus_takes_its_place_with_a_warning(tmp_path, monkeypatch, caplog, keys):
    root = tmp_path / "library"
    root.mkdir()
    for number in range(6):
        text = f"def function_{number}():\n    return {number}\n" * 9
        (root / f"module_{number}.py").write_text(text)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    config = DataConfig(**keys, offline_dataset="pystdlib", cache_dir=tmp_path / "corpora")
    corpus = open_corpus(config)
    assert "REQUESTED CORPUS UNAVAILABLE" in caplog.text
    assert f"dataset = '{keys['dataset']}'" in str(corpus.fallback_for)
    assert corpus.name.startswith("pystdlib-")


@pytest.mark.usefixtures("offline")
def test_a_prepared_corpus_needs_no_hub(elsewhere, corpus):
    config = elsewhere.model_copy(update={"tokenizer": "some/tokenizer"})
    shutil.copytree(corpus.folder, plan_from_name(config).folder)
    assert open_corpus(config).fingerprint == corpus.fingerprint


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9: " in hub_error()
