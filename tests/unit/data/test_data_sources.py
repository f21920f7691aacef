import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DATASETS
from switchtitan.data.sources import Source
from switchtitan.data.sources.files import TEXT_DOCUMENT_BYTES, read_text
from switchtitan.data.sources.pystdlib import StandardLibrarySource
from switchtitan.errors import CorpusError

DOCUMENTS = make_documents(23, seed=1)


def make_source(dataset: str, folder: Path, text_column: str | None = None) -> Source:
    return DATASETS[dataset].open(folder, text_column)


def write_corpus(dataset: str, folder: Path, key: str = "text") -> None:
    if dataset == "text":
        for number, document in enumerate(DOCUMENTS):
            (folder / f"{number:02d}.txt").write_bytes(document.encode())
    elif dataset == "parquet":
        for number, part in enumerate([DOCUMENTS[:9], DOCUMENTS[9:]]):
            table = pyarrow.table({"id": list(range(len(part))), key: part})
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=4)
    else:
        write_json_lines(folder / f"0.{dataset}", DOCUMENTS[:9], key)
        write_json_lines(folder / "sub" / f"1.{dataset}", DOCUMENTS[9:], key)


@pytest.mark.parametrize("dataset", ["text", "jsonl", "json.gz", "parquet"])
def test_files_yield_their_documents_in_order(dataset: str, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path)
    (tmp_path / "README").write_text("not part of it")
    assert list(make_source(dataset, tmp_path).open(None)) == DOCUMENTS


@pytest.mark.parametrize("dataset", ["text", "jsonl", "json.gz", "parquet"])
@pytest.mark.parametrize("taken", [0, 1, 9, 10, 22, 23])
def test_a_stream_resumes_at_its_position(dataset: str, taken: int, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path)
    source = make_source(dataset, tmp_path)
    stream = source.open(None)
    for _ in range(taken):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    assert list(source.open(None, position)) == DOCUMENTS[taken:]


@pytest.mark.parametrize("dataset", ["jsonl", "json.gz", "parquet"])
def test_another_column_can_hold_the_text(dataset: str, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path, key="body")
    assert list(make_source(dataset, tmp_path, text_column="body").open(None)) == DOCUMENTS
    with pytest.raises(CorpusError, match=r"'text', found .*body.*set \[data\] text_column"):
        list(make_source(dataset, tmp_path).open(None))


def test_a_single_file_can_be_the_corpus(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "any.name", DOCUMENTS)
    assert list(make_source("jsonl", tmp_path / "any.name").open(None)) == DOCUMENTS


def test_a_long_text_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"línea {number}\r\n" for number in range(12_000))
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    pieces = list(read_text(file))
    assert "".join(pieces) == text
    assert all(piece.endswith("\r\n") for piece in pieces)
    assert len(pieces) == -(-len(text.encode()) // (TEXT_DOCUMENT_BYTES + 14)) > 1


@pytest.mark.parametrize(
    ("dataset", "name", "contents", "message"),
    [
        ("text", "a.txt", b"\xff\xfe", "expected UTF-8"),
        (
            "jsonl",
            "a.jsonl",
            b'{"text": "a"}\n{"text"',
            r"a\.jsonl, line 2: expected one JSON object",
        ),
        ("jsonl", "a.jsonl", b"[1]\n", "expected a JSON object, got list"),
        ("json.gz", "a.json.gz", b"no gzip", "damaged or truncated gzip"),
        ("parquet", "a.parquet", b"no parquet", "damaged Parquet"),
    ],
)
def test_damaged_files_are_named(
    dataset: str, name: str, contents: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(CorpusError, match=message):
        list(make_source(dataset, tmp_path).open(None))


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path) -> None:
    write_corpus("json.gz", tmp_path)
    file = tmp_path / "sub" / "1.json.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"1\.json\.gz: damaged or truncated"):
        list(make_source("json.gz", tmp_path).open(None))


def test_missing_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such file or folder"):
        make_source("text", tmp_path / "missing")
    with pytest.raises(CorpusError, match=r"no parquet files; expected names \*\.parquet"):
        make_source("parquet", tmp_path)


def test_a_change_of_a_file_changes_the_identity(tmp_path: Path) -> None:
    write_corpus("text", tmp_path)
    before = make_source("text", tmp_path).identity()
    assert make_source("text", tmp_path).identity() == before
    with (tmp_path / "07.txt").open("a") as file:
        file.write("!")
    assert make_source("text", tmp_path).identity() != before


def test_the_standard_library_excludes_other_packages(tmp_path: Path) -> None:
    for name in [
        "b.py",
        "a/c.py",
        "site-packages/x.py",
        "_sysconfigdata__linux.py",
        "config-3/y.py",
        "z.txt",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "bad.py").write_bytes(b"\xff")
    assert list(StandardLibrarySource(tmp_path).open(None)) == ["# a/c.py", "# b.py"]


def test_the_running_standard_library_is_a_corpus() -> None:
    stream = DATASETS["pystdlib"].open(None, None).open(None)
    first = [next(stream) for _ in range(20)]
    assert any("import" in text for text in first)


def test_a_standard_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no \.py files"):
        StandardLibrarySource(tmp_path)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus("text", tmp_path)
    source = make_source("text", tmp_path)
    (tmp_path / "03.txt").unlink()
    with pytest.raises(CorpusError, match=r"03\.txt: cannot be read"):
        list(source.open(None))
