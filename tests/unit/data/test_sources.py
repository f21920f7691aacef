"""Every dataset yields its documents in order and resumes at any position; a file that cannot be
read is named."""

import importlib.util
import json
import struct

import pytest
from support.insides import read_tokens_at_a_time
from support.tiny_documents import (
    BODY,
    IDS,
    ROWS,
    TEXTS,
    TOKENIZER,
    write_c4,
    write_hub,
    write_lines,
    write_parquet,
    write_parquets,
    write_texts,
)

from switchtitan.data.config import SourceConfig
from switchtitan.data.sources import DATASETS, TEXT_DOCUMENT_BYTES, read_text
from switchtitan.errors import CorpusError


def make_source(dataset, folder=None, **keys):
    return DATASETS[dataset].open(SourceConfig(dataset=dataset, path=folder, **keys), None)


def documents_of(source, split=None, position=None, tokenizer=TOKENIZER):
    for document, after in source.read(split, position, tokenizer):
        yield document if isinstance(document, str) else document.tolist(), after


def read(source, *arguments):
    return [document for document, _ in documents_of(source, *arguments)]


@pytest.mark.parametrize("name", ROWS)
def test_a_source_yields_its_documents_in_order_and_resumes_at_every_position(name, tmp_path):
    row = ROWS[name]
    row.write(tmp_path)
    source = make_source(row.dataset, tmp_path, **row.keys)
    assert row.split is None or row.split in source.splits()
    assert source.repository is None  # which has commits
    straight = list(documents_of(source, row.split))
    assert [document for document, _ in straight] == row.documents
    for taken, (_, position) in enumerate(straight, start=1):
        rest = list(documents_of(source, row.split, json.loads(json.dumps(position))))
        assert [document for document, _ in rest] == row.documents[taken:]
        for _, after in rest[:1]:  # a preparation may be stopped twice
            saved = json.loads(json.dumps(after))
            assert read(source, row.split, saved) == row.documents[taken + 1 :]


@pytest.mark.parametrize("kind", ["json.gz", "jsonl.zst"])
def test_parts_of_a_compressed_file_are_joined(kind, tmp_path):
    write_lines(kind)(tmp_path)
    parts = [tmp_path / f"0.{kind}", tmp_path / "sub" / f"1.{kind}"]
    joined = tmp_path / f"joined.{kind}"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(make_source("jsonl", joined, **BODY)) == TEXTS


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"línea {number}\r\n" for number in range(12_000))
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    pieces = list(read_text(file, ""))
    assert "".join(pieces) == text
    assert all(piece.endswith("\r\n") for piece in pieces)
    assert len(pieces) == -(-len(text.encode()) // (TEXT_DOCUMENT_BYTES + 14)) > 1


@pytest.mark.parametrize("num_tokens", [1, 4, 100])
def test_a_document_may_be_longer_than_what_is_read_at_a_time(num_tokens, tmp_path, monkeypatch):
    read_tokens_at_a_time(monkeypatch, num_tokens)
    ROWS["nanogpt"].write(tmp_path)
    assert read(make_source("nanogpt", tmp_path)) == IDS


def test_the_standard_library_excludes_other_packages(tmp_path, monkeypatch):
    names = ["b.py", "a/c.py", "site-packages/x.py", "_sysconfigdata__linux.py", "config-3/y.py"]
    for name in [*names, "z.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "bad.py").write_bytes(b"\xff")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read(make_source("pystdlib")) == ["# a/c.py", "# b.py"]


def test_every_chapter_of_the_english_corpus_is_a_document():
    chapters = read(make_source("english"))
    assert len(chapters) == 1189
    assert sum(len(chapter.encode()) for chapter in chapters) == 4_054_753
    assert chapters[0].startswith("In the beginning God created the heavens and the earth. Now")


def test_without_its_package_the_english_corpus_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"pip install '\.\[english"):
        make_source("english")


def truncated(kind):
    def write(folder):
        write_lines(kind, "text")(folder)
        file = folder / f"0.{kind}"
        file.write_bytes(file.read_bytes()[:-20])

    return write


def holding(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


def write_latin_cell(folder):
    import pyarrow

    latin = pyarrow.array([b"a", b"\xff"]).cast(pyarrow.string(), safe=False)
    write_parquet(folder / "a.parquet", text=latin)


def write_half_of_c4(folder):
    write_c4(folder)
    (folder / "en" / "c4-validation.00000-of-00001.json.gz").unlink()


@pytest.mark.parametrize(
    ("dataset", "write", "words"),
    [
        ("jsonl", holding("a.jsonl", b"[1]\n"), r"a\.jsonl: .*line 1.*got list"),
        ("jsonl", holding("a.jsonl", b'{"text": 3}'), r"line 1.*'text', found int"),
        ("jsonl", write_lines("jsonl"), r"text_column = 'text', found .*body"),
        ("jsonl", truncated("json.gz"), r"0\.json\.gz: cannot be read"),
        ("jsonl", truncated("jsonl.zst"), r"0\.jsonl\.zst: cannot be read"),
        ("parquet", write_parquets, r"0\.parquet: .*text_column = 'text', found .*body"),
        ("parquet", write_latin_cell, r"a\.parquet: .*utf-8"),
        ("parquet", write_texts, r"no parquet files"),
        ("c4", write_half_of_c4, r"c4-validation\."),
        ("hub", write_hub, r"text_column = 'text', found .*body"),
        ("nanogpt", holding("a.bin", b"\1\2\3"), r"a\.bin: .*Size of .*not a multiple"),
        # llm.c's header.
        ("nanogpt", holding("a.bin", struct.pack("<3I", 20240520, 1, 1)), "token 55432"),
    ],
)
def test_what_cannot_be_read_is_named(dataset, write, words, tmp_path):
    write(tmp_path)
    with pytest.raises(CorpusError, match=words):
        read(make_source(dataset, tmp_path))


@pytest.mark.parametrize(("config", "split"), [("fr", None), ("en", "tset")])
def test_a_configuration_or_split_that_is_not_there_is_named(tmp_path, config, split):
    write_hub(tmp_path)
    source = make_source("hub", tmp_path, **BODY, hub_config=config, hub_split=split)
    with pytest.raises(CorpusError, match=f"{split or config}.*hub_config"):
        read(source, next(iter(source.splits()), None))
