import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from support.tiny_documents import make_documents, write_json_lines

from switchtitan.data import DATASETS
from switchtitan.data.segments import Limits, text_batches
from switchtitan.data.sources import Source, SourceKeys, TokenizedSource
from switchtitan.data.sources.files import TEXT_DOCUMENT_BYTES, read_text
from switchtitan.data.sources.pystdlib import StandardLibrarySource
from switchtitan.errors import CorpusError

DOCUMENTS = make_documents(23, seed=1)


def make_source(dataset: str, folder: Path, text_column: str | None = None) -> Source:
    source = DATASETS[dataset].open(SourceKeys(folder, text_column))
    assert not isinstance(source, TokenizedSource)
    return source


def read_strictly(source: Source) -> list[str]:
    """The documents; a malformed record is an error."""
    batches = text_batches(source.open(None), Limits(None, None), 0, 0, "stop")
    return [text for batch in batches for text in batch.documents]


def write_corpus(dataset: str, folder: Path, key: str = "text") -> None:
    if dataset == "text":
        for number, document in enumerate(DOCUMENTS):
            (folder / f"{number:02d}.txt").write_bytes(document.encode())
    elif dataset == "arrow":
        Dataset.from_dict({"id": list(range(len(DOCUMENTS))), key: DOCUMENTS}).save_to_disk(folder)
    elif dataset == "parquet":
        for number, part in enumerate([DOCUMENTS[:9], DOCUMENTS[9:]]):
            table = pyarrow.table({"id": list(range(len(part))), key: part})
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=4)
    else:
        write_json_lines(folder / f"0.{dataset}", DOCUMENTS[:9], key)
        write_json_lines(folder / "sub" / f"1.{dataset}", DOCUMENTS[9:], key)


@pytest.mark.parametrize("dataset", ["text", "jsonl", "json.gz", "jsonl.zst", "parquet", "arrow"])
def test_files_yield_their_documents_in_order(dataset: str, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path)
    (tmp_path / "README").write_text("not part of it")
    assert list(make_source(dataset, tmp_path).open(None)) == DOCUMENTS


@pytest.mark.parametrize("dataset", ["text", "jsonl", "json.gz", "jsonl.zst", "parquet", "arrow"])
@pytest.mark.parametrize("taken", [0, 1, 9, 10, 22, 23])
def test_a_stream_resumes_at_its_position(dataset: str, taken: int, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path)
    source = make_source(dataset, tmp_path)
    stream = source.open(None)
    for _ in range(taken):
        next(stream)
    position = json.loads(json.dumps(stream.position()))
    assert list(source.open(None, position)) == DOCUMENTS[taken:]


@pytest.mark.parametrize("dataset", ["jsonl", "json.gz", "jsonl.zst", "parquet"])
def test_another_column_can_hold_the_text(dataset: str, tmp_path: Path) -> None:
    write_corpus(dataset, tmp_path, key="body")
    assert list(make_source(dataset, tmp_path, text_column="body").open(None)) == DOCUMENTS
    with pytest.raises(CorpusError, match=r"'text', found .*body.*set \[data\] text_column"):
        read_strictly(make_source(dataset, tmp_path))


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
        ("text", "a.txt", b"a\n\xff\xfe", r"a\.txt, line 2: expected UTF-8"),
        (
            "jsonl",
            "a.jsonl",
            b'{"text": "a"}\n{"text"',
            r"a\.jsonl, line 2: expected one JSON object",
        ),
        ("jsonl", "a.jsonl", b"[1]\n", "expected a JSON object, got list"),
        ("json.gz", "a.json.gz", b"no gzip", "damaged or truncated gzip"),
        ("jsonl.zst", "a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: damaged zstd"),
        ("jsonl", "a.jsonl", b"[" * 99_999, r"line 1: expected one JSON object per line"),
        ("parquet", "a.parquet", b"no parquet", r"a\.parquet: damaged Parquet"),
    ],
)
def test_damaged_files_are_named(
    dataset: str, name: str, contents: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(CorpusError, match=message):
        read_strictly(make_source(dataset, tmp_path))


def test_a_truncated_gzip_file_is_an_error(tmp_path: Path) -> None:
    write_corpus("json.gz", tmp_path)
    file = tmp_path / "sub" / "1.json.gz"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"1\.json\.gz: damaged or truncated"):
        list(make_source("json.gz", tmp_path).open(None))


def test_a_truncated_zstd_file_is_an_error(tmp_path: Path) -> None:
    write_corpus("jsonl.zst", tmp_path)
    file = tmp_path / "sub" / "1.jsonl.zst"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"1\.jsonl\.zst: truncated"):
        list(make_source("jsonl.zst", tmp_path).open(None))


def test_frames_of_a_zstd_file_are_joined(tmp_path: Path) -> None:
    write_corpus("jsonl.zst", tmp_path)
    parts = [tmp_path / "0.jsonl.zst", tmp_path / "sub" / "1.jsonl.zst"]
    joined = tmp_path / "joined" / "all.jsonl.zst"
    joined.parent.mkdir()
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert list(make_source("jsonl.zst", joined).open(None)) == DOCUMENTS


def test_without_a_package_for_zstd_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(CorpusError, match=r"no package for Zstandard.*pip install 'switchtitan\[z"):
        make_source("jsonl.zst", tmp_path)


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
    stream = DATASETS["pystdlib"].open(SourceKeys()).open(None)
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


@pytest.mark.parametrize("dataset", ["text", "jsonl", "json.gz", "jsonl.zst", "parquet"])
def test_a_file_without_permission_is_named(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(dataset, tmp_path)
    source = make_source(dataset, tmp_path)

    def refuse(*arguments: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, who may read every file.
    monkeypatch.setattr("pathlib.Path.open", refuse)
    monkeypatch.setattr("gzip.open", refuse)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile", refuse)
    with pytest.raises(CorpusError, match=r"0+\.\S+: cannot be read \(Permission denied\)"):
        read_strictly(source)


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    write_corpus("parquet", tmp_path)
    file = tmp_path / "1.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CorpusError, match=r"1\.parquet: damaged Parquet"):
        read_strictly(make_source("parquet", tmp_path))


def test_a_link_to_a_missing_file_is_named(tmp_path: Path) -> None:
    write_corpus("jsonl", tmp_path)
    (tmp_path / "2.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(CorpusError, match=r"2\.jsonl: is not a file, or a link to a missing one"):
        make_source("jsonl", tmp_path)


def test_a_folder_named_like_a_file_is_searched(tmp_path: Path) -> None:
    """Spark writes folders of this kind."""
    write_corpus("parquet", tmp_path)
    folder = tmp_path / "all.parquet"
    folder.mkdir()
    (tmp_path / "1.parquet").rename(folder / "1.parquet")
    assert read_strictly(make_source("parquet", tmp_path)) == DOCUMENTS


def test_links_out_of_the_folder_are_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus("jsonl", tmp_path / "in")
    source = make_source("jsonl", tmp_path / "in")
    (tmp_path / "in" / "copy.jsonl").symlink_to(tmp_path / "in" / "0.jsonl")
    read_strictly(source)
    assert caplog.text == ""
    (tmp_path / "in" / "0.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (tmp_path / "in" / "0.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    source = make_source("jsonl", tmp_path / "in")
    for _ in range(2):
        # The names are sorted: 0, copy, sub/1.
        assert read_strictly(source) == DOCUMENTS[:9] + DOCUMENTS[:9] + DOCUMENTS[9:]
    assert len(caplog.messages) == 1
    assert "2 of 3 files" in caplog.messages[0]
    assert "elsewhere.jsonl" in caplog.messages[0]
