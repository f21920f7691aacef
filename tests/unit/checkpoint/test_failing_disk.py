"""If a write of a checkpoint fails, earlier ones stay complete and training can continue."""

import json
import logging
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_tensors
from support.disk_faults import CASES
from support.failing_disk import (
    Call,
    Fault,
    build,
    call_preloaded,
    folder_in_memory,
    logged_calls,
    set_faults,
)
from torch import Tensor

from switchtitan.checkpoint import CheckpointConfig, Checkpointer
from switchtitan.checkpoint.find import find_latest
from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError
from switchtitan.files import make_folder, write_atomically

STEPS = {step: f"step-{step:09d}" for step in range(1, 9)}
ERROR_TEXTS = {
    "EIO": "Input/output error",
    "ENOSPC": "No space left on device",
    "EDQUOT": "Disk quota exceeded",
    "EROFS": "Read-only file system",
}


class Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(50, 71, generator=generator),
        "norm": torch.randn(11, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(step),
    }


def make_checkpointer(folder: Path, **config: object) -> Checkpointer:
    return Checkpointer(
        folder,
        CheckpointConfig(**config),
        identity={"model": "tiny"},
        metadata={},
        is_main=True,
        group=None,
        background_group=None,
    )


def save(checkpointer: Checkpointer, step: int) -> None:
    checkpointer.save(step, tensors_of(step), {"tokens_seen": step})
    checkpointer.finish()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_whole(checkpoint: Path, step: int) -> bool:
    metadata, found = check_contents(checkpoint), read_tensors(checkpoint)
    return metadata.step == step and all(
        torch.equal(found[name], tensor) for name, tensor in tensors_of(step).items()
    )


def save_with_all_faults(folder: Path) -> None:
    """Runs in a process with the library: all cases, the order of calls, and crashes."""
    handler = Messages()
    logging.getLogger("switchtitan").addHandler(handler)
    outcomes = {}
    for index, (name, case) in enumerate(CASES.items()):
        home = folder / str(index) / "checkpoints"
        is_pruned = "prun" in name
        checkpointer = make_checkpointer(
            home,
            async_save=index % 2 == 0,
            on_failure="continue",
            keep_latest=1 if is_pruned else 2,
        )
        save(checkpointer, 1)
        handler.texts.clear()
        set_faults(*case.faults)
        save(checkpointer, 2)
        set_faults()
        outcome = {
            "num_failed": checkpointer.num_failed_saves,
            "latest": checkpointer.latest.name,
            "messages": "\n".join(handler.texts),
            "after": names(home),
            "visible": [path for path in names(home) if re.fullmatch(r"step-\d+", path)],
        }
        outcome["whole"] = [
            path for path in outcome["visible"] if is_whole(home / path, int(path[5:]))
        ]
        save(checkpointer, 3)
        outcome["at the end"] = names(home)
        outcome["is the last whole"] = is_whole(checkpointer.latest, 3)
        outcomes[name] = outcome
    outcomes["unreadable"] = skip_an_unreadable_checkpoint(folder, handler)
    outcomes["calls"] = calls_of_saves(folder)
    outcomes["atomic calls"] = calls_of_an_atomic_write(folder)
    outcomes["crashes"] = crash_at_each_call(folder)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def calls_of_saves(folder: Path) -> list[list[str | None]]:
    """The calls of two saves in a new folder, the second of which deletes the first."""
    home = folder / "calls" / "run" / "checkpoints"
    checkpointer = make_checkpointer(home, async_save=False, keep_latest=1)
    with logged_calls(folder / "calls.log", f"{folder}/calls*") as calls:
        save(checkpointer, 1)
        save(checkpointer, 2)
    return [
        [call.operation, str(call.path), call.new_path and str(call.new_path)] for call in calls
    ]


def calls_of_an_atomic_write(folder: Path) -> list[list[str | None]]:
    with logged_calls(folder / "atomic.log", f"{folder}/atomic*") as calls:
        make_folder(folder / "atomic" / "spectra")
        write_atomically(folder / "atomic" / "spectra" / "file", "contents")
    return [
        [call.operation, _without_random(call.path), call.new_path and call.new_path.name]
        for call in calls
    ]


def _without_random(path: Path) -> str:
    return re.sub(r"\.\d+-[0-9a-f]+\.new$", ".new", path.name)


def skip_an_unreadable_checkpoint(folder: Path, handler: Messages) -> str:
    """The disk of the newest checkpoint has a bad sector."""
    home = folder / "unreadable" / "checkpoints"
    for step in (1, 2):
        save(make_checkpointer(home, async_save=False), step)
    handler.texts.clear()
    set_faults(Fault("read", f"{home}/{STEPS[2]}/*.distcp", "EIO"))
    found = make_checkpointer(home).checkpoint_to_resume()
    set_faults()
    return "\n".join([str(found), *handler.texts])


CRASHES = [("fsync", 9), ("create", 6), ("write", 6), ("rename", 3), ("unlink", 6), ("mkdir", 1)]
"""Operations, and about how many of each a save with pruning has."""


def crash_at_each_call(folder: Path) -> dict[str, list[str]]:
    """Kills a process in the save of step 2, and saves step 3 in the next process."""
    results = {}
    for operation, num in CRASHES:
        for at in range(1, num + 1):
            home = folder / f"crash-{operation}-{at}" / "checkpoints"
            save(make_checkpointer(home, async_save=False), 1)
            process = os.fork()
            if process == 0:
                set_faults(Fault(operation, f"{home}*", "kill", at=at))
                save(make_checkpointer(home, async_save=False, keep_latest=1), 2)
                os._exit(0)
            _, status = os.waitpid(process, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            latest = find_latest(home)
            assert latest is not None, (operation, at)
            assert is_whole(latest, int(latest.name[5:]))
            resumed = make_checkpointer(home, async_save=False, keep_latest=1)
            assert resumed.checkpoint_to_resume() == latest
            save(resumed, 3)
            assert is_whole(resumed.latest, 3)
            results[f"{operation} {at}"] = [str(killed), latest.name, *names(home)]
    return results


@pytest.fixture(scope="module")
def outcomes() -> dict:
    with folder_in_memory() as folder:
        call_preloaded(build(folder), save_with_all_faults, folder)
        return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_fault_leaves_earlier_checkpoints_whole_and_has_its_documented_outcome(outcomes, name):
    case, outcome = CASES[name], outcomes[name]
    is_pruned = "prun" in name
    assert outcome["num_failed"] == (not case.is_saved)
    assert outcome["latest"] == STEPS[2 if case.is_saved else 1]
    assert outcome["whole"] == outcome["visible"]
    expected = [STEPS[1], STEPS[2]] if case.is_saved or case.is_visible else [STEPS[1]]
    if is_pruned and not name.startswith("rename"):
        expected = [STEPS[2]]
    assert outcome["visible"] == expected
    assert sorted(set(outcome["after"]) - set(expected)) == ([case.leaves] if case.leaves else [])
    message = case.message or ERROR_TEXTS.get(case.faults[0].outcome, "")
    assert re.search(message, outcome["messages"]), outcome["messages"]
    if not case.is_saved:
        assert re.search(
            r"cannot save step 2 .*A checkpoint takes about [\d.]+ KiB, [\d.]+ [KMGT]iB are free.*"
            "Older checkpoints are untouched.* Training continues; the newest complete checkpoint "
            rf"is .*{STEPS[1]}",
            outcome["messages"],
        )


@pytest.mark.parametrize("name", CASES)
def test_the_save_after_a_fault_succeeds_and_removes_what_the_fault_left(outcomes, name):
    case, outcome = CASES[name], outcomes[name]
    is_kept = case.is_saved or case.is_visible
    kept = [STEPS[3]] if "prun" in name else [STEPS[2 if is_kept else 1], STEPS[3]]
    assert outcome["is the last whole"]
    assert outcome["at the end"] == kept


def test_files_are_flushed_before_their_folder_before_the_rename_before_the_folder_above(outcomes):
    calls = [
        Call(operation, Path(path), new and Path(new), "")
        for operation, path, new in outcomes["calls"]
    ]
    home = next(call.path for call in calls if call.path.name == "checkpoints")

    def places(operation: str, path: Path) -> list[int]:
        return [
            i for i, call in enumerate(calls) if (call.operation, call.path) == (operation, path)
        ]

    for step in (1, 2):
        partial = home / f".{STEPS[step]}.partial"
        (renamed,) = places("rename", partial)
        written = {call.path for call in calls if call.operation == "write"}
        files = {path for path in written if path.parent == partial}
        assert len(files) == 5
        for file in files:
            assert max(places("write", file)) < min(places("fsync", file)), file
            assert len(places("fsync", file)) == 1
        changed = [
            i
            for i, call in enumerate(calls)
            if call.path.parent == partial and call.operation in ("create", "fsync", "rename")
        ]
        (folder_flushed,) = places("fsync", partial)
        assert max(changed) < folder_flushed < renamed
        after = [i for i in places("fsync", home) if i > renamed]
        deleted = [
            i for i, call in enumerate(calls) if call.new_path and ".deleting" in str(call.new_path)
        ]
        assert min(after) < min(i for i in [*deleted, len(calls)] if i > renamed)
    # The deletion, and the folders that the first save made.
    assert max(places("fsync", home)) > max(
        i for i, call in enumerate(calls) if call.operation == "unlink"
    )
    for folder in (home, home.parent):
        (made,) = places("mkdir", folder)
        assert min(i for i in places("fsync", folder.parent) if i > made) < min(
            i for i, call in enumerate(calls) if call.operation == "write"
        )


def test_an_atomic_write_is_flushed_before_and_after_its_rename(outcomes):
    assert outcomes["atomic calls"] == [
        ["mkdir", "atomic", None],
        ["mkdir", "spectra", None],
        ["open", "atomic", None],
        ["fsync", "atomic", None],
        ["create", "file.new", None],
        ["write", "file.new", None],
        ["fsync", "file.new", None],
        ["rename", "file.new", "file"],
        ["open", "spectra", None],
        ["fsync", "spectra", None],
    ]


def test_a_checkpoint_that_cannot_be_read_is_skipped_with_the_reason(outcomes):
    found, *messages = outcomes["unreadable"].splitlines()
    assert found.endswith(STEPS[1])
    assert any(
        f"{STEPS[2]}: cannot read __0_0.distcp: Input/output error" in line
        and "skipping an incomplete checkpoint" in line
        for line in messages
    )


def test_a_crash_at_any_call_leaves_a_whole_checkpoint_and_no_leftovers_for_long(outcomes):
    crashes = outcomes["crashes"]
    for operation, num in CRASHES:
        killed = [crashes[f"{operation} {at}"][0] for at in range(1, num + 1)]
        assert killed.count("True") >= max(1, num - 2), (operation, killed)
    for place, (_, latest, *left) in crashes.items():
        assert latest in (STEPS[1], STEPS[2]), place
        assert left == [STEPS[3]], place
    assert {latest for _, latest, *_ in crashes.values()} == {STEPS[1], STEPS[2]}


def test_stop_raises_the_error(make_checkpointer, tensors, folder, monkeypatch):
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    folder.rename(folder.with_name("moved"))
    folder.write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"cannot save step 2 .*Not a directory"):
        checkpointer.save(2, tensors, {})
    assert checkpointer.num_failed_saves == 0
