"""A corpus that changes under a run ends the run with status 2, and its file is named."""

import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import run
from support.tiny import TINY

from switchtitan.training.stepper import Stepper


@pytest.fixture
def command(tmp_path: Path) -> tuple[object, ...]:
    """Trains a tiny run on its own corpus."""
    text = TINY.format(folder=tmp_path, method="full_rank", method_keys="")
    text = text.replace(f"{tmp_path}/../corpora", str(tmp_path / "corpora"))
    (tmp_path / "run.toml").write_text(text)
    return ("train", "--config", tmp_path / "run.toml", "--checkpoint.interval", 2)


def shard_of(folder: Path) -> Path:
    return next((folder / "corpora").glob("pystdlib-*/train-00000.bin"))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[: len(data) : 2] = bytes(byte ^ 1 for byte in data[: len(data) : 2])
    file.write_bytes(data)


def replace(file: Path) -> None:
    shutil.copyfile(file, file.with_name("other"))
    flip(file.with_name("other"))
    file.with_name("other").replace(file)


@pytest.mark.parametrize("change", [flip, replace, Path.unlink])
def test_between_start_and_resume(
    command: tuple, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    assert run(*command, "--training.steps", 2).status == 0
    shard = shard_of(tmp_path)
    change(shard)
    run(*command, "--training.steps", 4).check_refused(str(shard))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("change", [flip, replace])
def test_while_running(
    command: tuple,
    tmp_path: Path,
    change: Callable[[Path], object],
    num_workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = Stepper.step

    def step_and_change(stepper: Stepper) -> object:
        result = step(stepper)
        if stepper.state.step == 3:
            change(shard_of(tmp_path))
        return result

    monkeypatch.setattr(Stepper, "step", step_and_change)
    outcome = run(*command, "--training.steps", 40, "--data.num_workers", num_workers)
    outcome.check_refused(str(shard_of(tmp_path)), "does not match its checksum")
    # The exit of a process waits for them.
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    # Restored, the run resumes from its last checkpoint.
    flip(shard_of(tmp_path))
    assert run(*command, "--training.steps", 6).status == 0


def test_by_another_corpus_of_the_same_name(command: tuple, tmp_path: Path) -> None:
    assert run(*command, "--training.steps", 2).status == 0
    folder = shard_of(tmp_path).parent
    run("prepare", "--max_bytes", 60_000, "--vocab_size", 270, "--cache_dir", tmp_path / "b")
    other = next((tmp_path / "b").glob("pystdlib-*/"))
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    outcome = run(*command, "--training.steps", 4)
    outcome.check_refused("the checkpoint belongs to another run", "corpus.fingerprint")
