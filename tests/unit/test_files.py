"""Files are replaced atomically; names of foreign files stay in their folder."""

import errno
import hashlib
import os
import secrets

import pytest

from switchtitan.files import file_inside, sha256_of_file, write_atomically


@pytest.mark.parametrize("contents", ["tëxt\n", b"\x00\xff"])
def test_a_file_is_replaced_and_nothing_is_left_over(tmp_path, contents):
    file = tmp_path / "file"
    write_atomically(file, "old")
    write_atomically(file, contents)
    assert file.read_bytes() == (contents if isinstance(contents, bytes) else contents.encode())
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_contents(tmp_path, monkeypatch, error):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def fail(descriptor):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_at_the_same_time_do_not_mix(tmp_path, monkeypatch):
    file, fsync = tmp_path / "file", os.fsync

    def write_too(descriptor):
        """A second writer writes all of its contents while the first one flushes."""
        monkeypatch.setattr(os, "fsync", fsync)
        write_atomically(file, "of the second writer, and longer")
        assert file.read_text() == "of the second writer, and longer"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_too)
    write_atomically(file, "of the first writer")
    assert file.read_text() == "of the first writer"
    assert list(tmp_path.iterdir()) == [file]


def test_a_checksum_is_that_of_all_bytes(tmp_path):
    data = os.urandom((1 << 22) + 3)  # more than is read at a time
    (tmp_path / "file").write_bytes(data)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path):
    """A folder that somebody else may have written, next to a secret."""
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("own")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../outside", "/etc/passwd", "b/a", "./a", "a/", "a\0b", "\ud800", "x" * 300],
)
def test_paths_are_no_names(folder, name):
    with pytest.raises(ValueError):  # noqa: PT011
        file_inside(folder, name)


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "../missing", ".."])
def test_a_link_out_of_the_folder_is_refused(folder, target):
    (folder / "link").symlink_to(target)
    with pytest.raises(ValueError, match="outside of the folder"):
        file_inside(folder, "link")


def test_links_within_the_folder_and_links_to_it_are_followed(folder, tmp_path):
    (folder / "link").symlink_to("a")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert file_inside(folder, "link").read_text() == "own"
    assert file_inside(tmp_path / "elsewhere", "link").read_text() == "own"
    assert file_inside(folder, "missing") == folder / "missing"


def test_a_snapshot_of_the_hugging_face_cache_links_to_its_blobs_only(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab12").write_text("weights")
    (blobs / "cd34").symlink_to("/etc/passwd")
    links = {"model.safetensors": "blobs/ab12", "config.json": "blobs/cd34", "other": "refs"}
    for name, target in links.items():
        (snapshot / name).symlink_to(f"../../{target}")
    assert file_inside(snapshot, "model.safetensors").read_text() == "weights"
    for name in ("config.json", "other"):
        with pytest.raises(ValueError, match="outside of the folder"):
            file_inside(snapshot, name)


def test_an_atomic_write_follows_no_link(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "0" * 2 * num_bytes)
    (folder / f"index.json.{16 * '0'}.new").symlink_to("../outside")
    with pytest.raises(FileExistsError):
        write_atomically(folder / "index.json", "new")
    assert (tmp_path / "outside").read_text() == "secret"
