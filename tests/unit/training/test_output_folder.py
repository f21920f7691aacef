"""A folder in which nothing can be written is refused before any work; nothing is left."""

import errno
import random
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import World, start_world, stop_world
from switchtitan.errors import ConfigError
from switchtitan.training.output_folder import check_output_dir, check_writable, create_folder


@pytest.fixture
def world() -> Iterator[World]:
    yield start_world(ParallelismConfig())
    stop_world()


def test_a_writable_folder_stays_as_it_was(tmp_path: Path, world: World) -> None:
    check_output_dir(tmp_path / "a" / "b", world)
    assert not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    check_output_dir(tmp_path / "kept" / "b", world)
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


@pytest.mark.parametrize("function", ["touch", "mkdir"])
def test_a_write_that_fails_despite_permissions_names_the_key(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(path: Path, *args: object, **keys: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, function, fail)
    with pytest.raises(ConfigError, match=r"^\[job\] output_dir = .*No space left on device"):
        check_output_dir(tmp_path / "a" / "b", world)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["mkdir", "touch"])
@pytest.mark.parametrize("is_deleted_once", [True, False], ids=["once", "each time"])
def test_a_folder_that_another_process_deletes_meanwhile_is_created_again(
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    is_deleted_once: bool,
) -> None:
    original, deleted = getattr(Path, function), []

    def delete_the_parent_first(path: Path, *args: object, **keys: object) -> None:
        if path.parent == tmp_path / "a" and not (is_deleted_once and deleted):
            (tmp_path / "a").rmdir()
            deleted.append(path)
        original(path, *args, **keys)

    monkeypatch.setattr(Path, function, delete_the_parent_first)
    folder = tmp_path / "a" / "b" if function == "mkdir" else tmp_path / "a"
    if is_deleted_once:
        check_output_dir(folder, world)
        assert deleted
    else:
        with pytest.raises(ConfigError, match="No such file or directory"):
            check_output_dir(folder, world)
    assert not list(tmp_path.iterdir())


def test_folders_that_another_thread_creates_and_deletes_are_no_error(tmp_path: Path) -> None:
    has_ended = threading.Event()

    def create_and_delete() -> None:
        choose = random.Random(0)
        while not has_ended.is_set():
            for change in (Path.mkdir, Path.rmdir):
                with suppress(OSError):
                    change(tmp_path / "a")
                time.sleep(choose.uniform(0.0, 2e-4))

    other = threading.Thread(target=create_and_delete)
    other.start()
    try:
        for _ in range(300):
            check_writable(tmp_path / "a" / "b")
            with ExitStack() as created:
                create_folder(tmp_path / "a" / "b", created)
                assert (tmp_path / "a" / "b").is_dir()
    finally:
        has_ended.set()
        other.join()
