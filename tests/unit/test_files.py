"""Files are replaced atomically, locked once, and a file system without locks is a clear error."""

import errno
import fcntl
import hashlib
import os
import secrets
import threading
import time
from pathlib import Path

import pytest

from switchtitan.errors import EnvironmentMismatchError, abbreviate
from switchtitan.files import (
    create_atomically,
    format_bytes,
    lock,
    make_folder,
    sha256_of_file,
    sync_file,
    try_lock,
    write_atomically,
)


@pytest.mark.parametrize("contents", ["tëxt\n", b"\x00\xff"])
def test_a_file_is_replaced_and_nothing_is_left_over(tmp_path, contents):
    file = tmp_path / "file"
    write_atomically(file, "old")
    write_atomically(file, contents)
    assert file.read_bytes() == (contents if isinstance(contents, bytes) else contents.encode())
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_the_old_contents(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def write_during_another_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second writer writes all of its contents while the first one flushes."""
    fsync = os.fsync

    def second_writer(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(file, "of the second writer, and longer")
        assert file.read_text() == "of the second writer, and longer"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", second_writer)
    write_atomically(file, "of the first writer")
    assert file.read_text() == "of the first writer"
    assert list(file.parent.iterdir()) == [file]


def test_two_writers_at_the_same_time_do_not_mix(tmp_path, monkeypatch):
    write_during_another_write(tmp_path / "file", monkeypatch)


def test_writers_with_the_same_temporary_file_are_found(tmp_path, monkeypatch):
    """The check above can fail."""
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "0" * 2 * num_bytes)
    with pytest.raises(FileExistsError):
        write_during_another_write(tmp_path / "file", monkeypatch)


def test_a_file_is_created_once(tmp_path):
    create_atomically(tmp_path / "file", "first")
    with pytest.raises(FileExistsError):
        create_atomically(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_repeated_request_of_a_network_file_system_has_created_the_file(tmp_path, monkeypatch):
    link = os.link

    def link_twice(*arguments: Path) -> None:
        link(*arguments)
        link(*arguments)

    monkeypatch.setattr(os, "link", link_twice)
    create_atomically(tmp_path / "file", "contents")
    assert (tmp_path / "file").read_text() == "contents"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", "new")
    assert not list(tmp_path.iterdir())


def test_a_write_deletes_what_killed_writers_of_the_same_file_left_an_hour_ago(tmp_path):
    old = ["file.71-0123abcd.new", "file.new", "other.71-0123abcd.new", "file.txt.new"]
    for name in (*old, "file.72-0123abcd.new"):
        (tmp_path / name).touch()
    two_hours_ago = time.time() - 7200
    for name in old:
        os.utime(tmp_path / name, (two_hours_ago, two_hours_ago))
    write_atomically(tmp_path / "file", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "file", "file.72-0123abcd.new", "file.txt.new", "other.71-0123abcd.new",
    ]  # fmt: skip


def test_folders_are_made_down_to_the_last_one(tmp_path):
    make_folder(tmp_path / "a" / "b" / "c")
    make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_flushed_file_can_be_read(tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"data")
        stream.flush()
        sync_file(stream.fileno())
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (340 << 20, "340 MiB"),
        (1000 << 20, "0.977 GiB"),
        (2190433321, "2.04 GiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_sizes_have_three_digits_and_a_fitting_unit(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_a_checksum_is_that_of_all_bytes(tmp_path):
    data = os.urandom((1 << 22) + 3)  # more than is read at a time
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_a_lock_is_held_once(tmp_path):
    with try_lock(tmp_path / "a" / "lock", key="output_dir") as first:
        assert first is not None
        with try_lock(tmp_path / "a" / "lock", key="output_dir") as second:
            assert second is None
    with try_lock(tmp_path / "a" / "lock", key="output_dir") as third:
        assert third is not None


def test_a_lock_is_waited_for(tmp_path):
    waits, order = threading.Event(), []

    def wait_for_it():
        with lock(tmp_path / "lock", waits.set, key="output_dir"):
            order.append("second")

    other = threading.Thread(target=wait_for_it)
    with lock(tmp_path / "lock", lambda: pytest.fail("nobody else holds it"), key="output_dir"):
        other.start()
        assert waits.wait(10)
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_clear_error(tmp_path, monkeypatch, number):
    def unsupported(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with (
        pytest.raises(
            EnvironmentMismatchError,
            match=r"^output_dir: .*lock has no file locks .*set output_dir to",
        ),
        try_lock(tmp_path / "lock", key="output_dir"),
    ):
        pass
    with (
        pytest.raises(EnvironmentMismatchError, match=os.strerror(number)),
        lock(tmp_path / "lock", lambda: None, key="output_dir"),
    ):
        pass


def test_long_lists_are_abbreviated():
    assert abbreviate("abcd") == "a, b, c, d"
    assert abbreviate("abcdef") == "a, b, c, d and 2 more"
