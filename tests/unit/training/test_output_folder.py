"""A folder in which nothing can be written is refused before any work; nothing is left."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from switchtitan.distributed.config import ParallelismConfig
from switchtitan.distributed.world import World, start_world, stop_world
from switchtitan.errors import ConfigError
from switchtitan.training.output_folder import check_output_dir


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
