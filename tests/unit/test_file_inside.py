import os
import secrets
from pathlib import Path

import pytest

from switchtitan.files import file_inside, write_atomically


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("own")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../outside", "/etc/passwd", "b/a", "./a", "a/", "a\0b", "\ud800", "x" * 300],
)
def test_paths_are_no_names(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"file name|encode"):
        file_inside(folder, name)


@pytest.mark.parametrize("target", ["../outside", "/etc/passwd", "../missing", "link", ".."])
def test_a_link_out_of_the_folder_is_refused(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(ValueError, match=r"outside of the folder|link to itself"):
        file_inside(folder, "link")


def test_links_within_the_folder_and_links_to_it_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to("a")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert file_inside(folder, "link").read_text() == "own"
    assert file_inside(tmp_path / "elsewhere", "link").read_text() == "own"
    assert file_inside(folder, "missing") == folder / "missing"


def test_a_snapshot_of_the_hugging_face_cache_links_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "ab12").write_text("weights")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab12")
    assert file_inside(snapshot, "model.safetensors").read_text() == "weights"
    (blobs / "cd34").symlink_to("/etc/passwd")
    (snapshot / "config.json").symlink_to("../../blobs/cd34")
    with pytest.raises(ValueError, match="outside of the folder"):
        file_inside(snapshot, "config.json")
    (snapshot / "other").symlink_to("../../refs")
    with pytest.raises(ValueError, match="outside of the folder"):
        file_inside(snapshot, "other")


def test_an_atomic_write_follows_no_link(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda num_bytes: "0" * 2 * num_bytes)
    (folder / f"index.json.{os.getpid()}-00000000.new").symlink_to("../outside")
    with pytest.raises(FileExistsError):
        write_atomically(folder / "index.json", "new")
    assert (tmp_path / "outside").read_text() == "secret"
