"""The default corpus: the standard library of the running interpreter, about 30 MB of Python."""

import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from switchtitan.data.sources.dataset import Position, SourceKeys
from switchtitan.data.sources.files import FileStream
from switchtitan.errors import CorpusError

_EXCLUDED_NAMES = ("site-packages", "dist-packages", "__pycache__")


class StandardLibrarySource:
    """One document per `.py` file, in the order of names, without build settings and files not in
    UTF-8."""

    splits: tuple[str, ...] = ()

    def __init__(self, root: Path) -> None:
        self._files = sorted(
            _library_files(root), key=lambda file: file.relative_to(root).as_posix()
        )
        if not self._files:
            raise CorpusError(
                f"[data] dataset = 'pystdlib': no .py files in {root}; install the standard "
                "library's sources or choose another dataset"
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


def pystdlib_source(keys: SourceKeys) -> StandardLibrarySource:
    """The standard library of the running interpreter."""
    return StandardLibrarySource(Path(sysconfig.get_paths()["stdlib"]))


def _library_files(root: Path) -> Iterator[Path]:
    """Yields the library's `.py` files, without walking site-packages, which can be ten times as
    large."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = filter(_is_included, subfolders)
        for name in files:
            if name.endswith(".py") and _is_included(name):
                yield Path(folder, name)


def _is_included(name: str) -> bool:
    # _sysconfigdata and the config folder hold the build machine's paths and so differ between
    # machines.
    return name not in _EXCLUDED_NAMES and not name.startswith(("_sysconfigdata", "config-"))


def _read_module(file: Path) -> Iterator[str]:
    try:
        yield file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
