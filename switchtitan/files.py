"""Atomic writes, flushes to disk and checksums of files."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_READ_BYTES = 1 << 22


def write_atomically(file: Path, contents: str | bytes) -> None:
    """Writes a file durably, strings as UTF-8. Readers see the old or the new contents, no mixture.

    The last of several writers wins. A killed process may leave a file `<name>.<random>.new`.
    """
    # A name that nobody can know: a link in its place would lead the write elsewhere.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.new")
    try:
        with named_errors(file):
            write_flushed(partial, contents.encode() if isinstance(contents, str) else contents)
        os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(file.parent)


def write_flushed(file: Path, contents: bytes | memoryview) -> None:
    """Create a file and flush it to disk; an error if it exists."""
    with file.open("xb") as stream:
        stream.write(contents)
        stream.flush()
        os.fsync(stream.fileno())


def rename_complete(partial: Path, folder: Path) -> None:
    """Gives a folder whose files are flushed its final name, durably.

    So whoever finds a folder of that name finds it complete, whenever process or power fail.
    """
    sync_folder(partial)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk; a file's fsync does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with named_errors(folder):
            os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not flush folders; their servers write names at once.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Adds `path` to errors of the system that name no file, as those of writes and flushes."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def make_folder(folder: Path) -> None:
    """Create a folder and those above it durably; nothing if it exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders in `folder` to disk, and itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            with file.open("rb") as stream, named_errors(file):
                os.fsync(stream.fileno())
        sync_folder(Path(root))


def sha256_of_file(file: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Returns a file's SHA-256 in hexadecimal; `on_bytes` gets the size of each block read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def checksum_line(contents: bytes, name: str) -> bytes:
    """Returns what `sha256sum` prints for a file of this name."""
    return f"{hashlib.sha256(contents).hexdigest()}  {name}\n".encode()


def file_inside(folder: Path, name: str) -> Path:
    """Returns the file `name` of a folder that somebody else may have written. Raises a ValueError
    if `name` is not a plain file name, or is a link to a file outside of `folder`. Links in a
    snapshot of the Hugging Face cache may lead to its `blobs`."""
    is_plain = name not in ("", ".", "..") and "\0" not in name and Path(name).name == name
    if not is_plain or len(os.fsencode(name)) > 255:
        raise ValueError(f"{name[:255]!r} is not a plain file name")
    root, target = (Path(os.path.realpath(path)) for path in (folder, folder / name))
    is_snapshot = root.parent.name == "snapshots"
    roots = [root, root.parent.parent / "blobs"] if is_snapshot else [root]
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{name!r} is a link to {target}, outside of the folder")
    return folder / name
