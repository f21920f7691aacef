"""The embedded default corpus: the running interpreter's standard library, about 30 MB of Python."""

import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from switchtitan.data.sources.dataset import Position
from switchtitan.data.sources.files import FileStream
from switchtitan.errors import CorpusError

_NOT_OF_THE_LIBRARY = ("site-packages", "dist-packages", "__pycache__")


class StandardLibrarySource:
    """One document per `.py` file, in the order of names; files that are not UTF-8 and build settings are
    left out."""

    splits: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self._files = sorted(
            _library_files(root), key=lambda file: file.relative_to(root).as_posix()
        )
        if not self._files:
            raise CorpusError(
                f'[data] dataset = "pystdlib": there are no .py files in {root}; install the standard '
                f"library's sources or "
                f"choose another dataset"
            )

    @property
    def description(self) -> str:
        return f"standard library of {platform.python_implementation()} {platform.python_version()}"

    @property
    def num_bytes(self) -> int | None:
        return sum(file.stat().st_size for file in self._files)

    def identity(self) -> Mapping[str, object]:
        return {"kind": "pystdlib", "interpreter": self.description, "bytes": self.num_bytes}

    def open(self, split: str | None, position: Position | None = None) -> FileStream:
        assert split is None
        return FileStream(self._files, _read_module, position)


def pystdlib_source(path: Path | None, text_column: str | None) -> StandardLibrarySource:
    """The standard library of the interpreter that runs this."""
    return StandardLibrarySource(Path(sysconfig.get_paths()["stdlib"]))


def _library_files(root: Path) -> Iterator[Path]:
    """The library's `.py` files. site-packages can hold ten times as many folders, so the walk stays out of it."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(_belongs, subfolders)
        for name in files:
            if name.endswith(".py") and _belongs(name):
                yield Path(folder, name)


def _belongs(name: str) -> bool:
    # _sysconfigdata and the config folder hold the build machine's paths: not the same on two machines of one
    # version.
    return name not in _NOT_OF_THE_LIBRARY and not name.startswith(("_sysconfigdata", "config-"))


def _read_module(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
