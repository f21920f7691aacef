"""Atomic writes, flushes to disk, locks and checksums of files."""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switchtitan.errors import EnvironmentMismatchError

_READ_BYTES = 1 << 22
_MAX_NAME_BYTES = 255


def write_atomically(file: Path, contents: str | bytes) -> None:
    """Write a file durably. Readers see either the old or the new contents, never a part of them.

    Of several writers at the same time, the last one wins. If it fails, the old contents stay, and
    no other file. A process that is killed may leave a file `<name>.<random>.new`.

    Args:
        contents: a string is encoded as UTF-8.
    """
    # A name that nobody can know: a link in its place would lead the write elsewhere.
    partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.new")
    try:
        with named_errors(file):
            with partial.open("xb") as stream:
                stream.write(contents.encode("utf-8") if isinstance(contents, str) else contents)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, file)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    sync_folder(file.parent)


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
    """Add `path` to errors of the system that name no file, as those of writes and flushes."""
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


def format_bytes(num_bytes: int) -> str:
    """Return a size with three digits in a fitting unit: 12 bytes, 1.5 KiB, 340 MiB, 2.04 GiB."""
    if num_bytes < 1024:
        return f"{num_bytes} bytes"
    size, units = num_bytes / 1024, ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1024
        del units[0]
    return f"{size:.3g} {units[0]}"


def sha256_of_file(file: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal.

    Args:
        on_bytes: called with the number of bytes of each block that was read.
    """
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            if on_bytes is not None:
                on_bytes(len(block))
    return digest.hexdigest()


def checksum_line(contents: bytes, name: str) -> bytes:
    """Return what `sha256sum` prints for a file of this name."""
    return f"{hashlib.sha256(contents).hexdigest()}  {name}\n".encode()


def exists(path: Path) -> bool:
    """Whether a file or folder exists; False also for paths that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file or folder within any folder, and nothing outside of it."""
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def file_inside(folder: Path, name: str) -> Path:
    """Return the file `name` of `folder`, for folders that somebody else may have written.

    Raises:
        ValueError: if `name` is not a plain file name, or is a link to a file outside of `folder`.
            Links in a snapshot of the Hugging Face cache may lead to the `blobs` of its repository.
    """
    if not is_plain_name(name) or len(os.fsencode(name)) > _MAX_NAME_BYTES:
        raise ValueError(f"{name[:40]!r} is not a plain file name")
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except RuntimeError as error:  # a link to itself, in Python before 3.13
        raise ValueError(f"{name!r} is a link to itself") from error
    is_snapshot = root.parent.name == "snapshots"
    roots = [root, root.parent.parent / "blobs"] if is_snapshot else [root]
    if target.is_symlink():  # a link to itself, since Python 3.13
        raise ValueError(f"{name!r} is a link to itself")
    if not any(target.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{name!r} is a link to {target}, outside of the folder")
    return folder / name


@contextmanager
def lock(file: Path, on_wait: Callable[[], object], key: str) -> Iterator[None]:
    """Hold an exclusive lock on `file`, which is created if missing and not deleted.

    If another process holds it, calls `on_wait` and waits. The system releases the lock when this
    process exits.

    Args:
        key: the configuration key of the folder, for the error.

    Raises:
        EnvironmentMismatchError: if the file system has no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            raise EnvironmentMismatchError(
                f"{key}: the file system of {file} has no file locks (flock: {error.strerror}); "
                f"set {key} to a folder on another disk, or mount this one with locks (Lustre: -o "
                "flock)"
            ) from error
        yield
