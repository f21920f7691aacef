"""A disk that fails or fills up: the run ends with an error; earlier checkpoints stay complete."""

import logging
import os
import pickle
import re
import signal
import tempfile
import traceback
from functools import partial
from itertools import groupby
from logging.handlers import BufferingHandler
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.checkpoints import WRITER, read_all_tensors
from support.commands import run
from support.failing_disk import (
    CASES,
    FILLER,
    SILENT,
    TEXTS,
    Fault,
    build,
    call_preloaded,
    fill,
    logged_calls,
    set_faults,
    small_disk,
)
from support.folders import names_in
from support.tensors import draw
from support.tiny import tiny_toml

from switchtitan.checkpoint.load import find_latest, verify
from switchtitan.errors import CheckpointError
from switchtitan.files import make_folder, write_atomically

STEPS = {step: f"step-{step:09d}" for step in range(1, 9)}


make_checkpointer = partial(checkpoints.make_checkpointer, async_save=False)


def tensors_of(step):
    weight, norm = draw(50, 71, seed=step), draw(11, seed=-step, dtype=torch.bfloat16)
    return {"weight": weight, "norm": norm, "step": torch.tensor(step)}


def save(checkpointer, step):
    checkpointer.save(step, tensors_of(step), {"tokens_seen": step})
    checkpointer.finish()


def is_whole(checkpoint):
    try:
        step = verify(checkpoint).step
    except CheckpointError:
        return False
    found = read_all_tensors(checkpoint)
    return all(torch.equal(found[name], tensor) for name, tensor in tensors_of(step).items())


def save_with_all_faults(folder):
    """Runs in a process with the library: all cases, the order of calls, and crashes."""
    outcomes = {}
    for index, name in enumerate(CASES):
        try:
            check_a_fault(folder / str(index) / "checkpoints", name, index % 2 == 0)
        except Exception:
            outcomes[name] = traceback.format_exc()
    with logged_calls(folder / "calls.log", f"{folder}/calls*") as outcomes["calls"]:
        checkpointer = make_checkpointer(folder / "calls" / "run" / "checkpoints", keep_latest=1)
        save(checkpointer, 1)
        save(checkpointer, 2)  # and deletes the first
    with logged_calls(folder / "atomic.log", f"{folder}/atomic*") as outcomes["atomic calls"]:
        make_folder(folder / "atomic" / "spectra")
        write_atomically(folder / "atomic" / "spectra" / "file", "contents")
    outcomes["crashes"] = crash_at_each_call(folder)
    (folder / "outcomes").write_bytes(pickle.dumps(outcomes))


def check_a_fault(home, name, is_async):
    """Saves steps 1, 2 and 3; the second save meets the fault."""
    fault, prunes = CASES[name][0], "pruning" in name
    is_noticed, is_silent = fault.outcome in TEXTS, fault.outcome in SILENT
    num_kept = 1 if prunes else 2
    checkpointer = make_checkpointer(home, async_save=is_async, keep_latest=num_kept)
    save(checkpointer, 1)
    log, error = BufferingHandler(1000), ""
    logging.getLogger("switchtitan").addHandler(log)
    set_faults(*CASES[name])
    try:
        save(checkpointer, 2)
    except CheckpointError as caught:
        error = str(caught)
    finally:
        set_faults()
        logging.getLogger("switchtitan").removeHandler(log)
    messages = "\n".join([error, *(record.getMessage() for record in log.buffer)])
    assert not is_noticed or TEXTS[fault.outcome] in messages, messages
    has_failed = "cannot save step 2" in error
    assert has_failed == bool(error) == (is_noticed and not prunes), messages
    assert has_failed == (checkpointer.latest.name == STEPS[1])
    whole = [path.name for path in sorted(home.glob("step-*")) if is_whole(path)]
    assert whole[0] == STEPS[1] or prunes, whole
    assert len(whole) == 2 or has_failed or is_silent or prunes, whole
    assert find_latest(home).name == whole[-1]
    save(checkpointer, 3)
    assert is_whole(checkpointer.latest)
    left = names_in(home)
    assert set(left) <= {*STEPS.values()}, left
    # What cannot be read is not counted.
    assert len(left) == num_kept + (is_silent and "metadata" in name), left


CRASHES = [("fsync", 6), ("create", 4), ("write", 4), ("rename", 3), ("unlink", 5), ("mkdir", 1)]
"""Operations, and about how many of each a save with pruning has."""


def crash_at_each_call(folder):
    """Kills a process in the save of step 2, and saves step 3 in the next process."""
    results = {}
    for operation, num in CRASHES:
        for at in range(1, num + 1):
            home = folder / f"crash-{operation}-{at}" / "checkpoints"
            save(make_checkpointer(home), 1)
            process = os.fork()
            if process == 0:
                set_faults(Fault(operation, f"{home}*", "kill", at=at))
                save(make_checkpointer(home, keep_latest=1), 2)
                os._exit(0)
            _, status = os.waitpid(process, 0)
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            latest = find_latest(home)
            assert latest is not None, (operation, at)
            assert is_whole(latest)
            resumed = make_checkpointer(home, keep_latest=1)
            save(resumed, 3)
            assert is_whole(resumed.latest)
            results[f"{operation} {at}"] = [killed, latest.name, *names_in(home)]
    return results


@pytest.fixture(scope="module")
def outcomes():
    # A flush to a disk takes longer than the rest of a small save.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        folder = Path(name)
        call_preloaded(build(folder), save_with_all_faults, folder)
        return pickle.loads((folder / "outcomes").read_bytes())


@pytest.mark.parametrize("name", CASES)
def test_a_fault_leaves_earlier_checkpoints_whole_and_nothing_after_the_next_save(outcomes, name):
    assert name not in outcomes, outcomes[name]


def calls_of_save(step):
    """What a save does, in order, without repetitions: operations and names."""
    partial = f".{STEPS[step]}.partial"
    index = ".metadata.tmp"
    calls = [("mkdir", partial)]
    for name in ("__0_0.distcp", index, "metadata.json", checkpoints.SUMS):
        calls += [("create", name), ("write", name), ("fsync", name)]
        calls += [("rename", index)] * (name == index)
    return [*calls, ("fsync", partial), ("rename", partial), ("fsync", "checkpoints")]


def test_files_are_flushed_before_their_folder_before_the_rename_before_the_folder_above(outcomes):
    calls = [(c.operation, c.path.name) for c in outcomes["calls"] if c.operation != "open"]
    made = [("mkdir", "calls"), ("mkdir", "run"), ("fsync", "calls"), ("mkdir", "checkpoints")]
    saved = [*made, ("fsync", "run"), *calls_of_save(1), *calls_of_save(2)]
    # The first checkpoint is deleted once the second one is complete.
    expected = [*saved, ("rename", STEPS[1])]
    assert [call for call, _ in groupby(calls)][: len(expected)] == expected


def test_an_atomic_write_is_flushed_before_and_after_its_rename(outcomes):
    calls = outcomes["atomic calls"]
    assert [(call.operation, re.sub(r"\.[0-9a-f]+\.", ".", call.path.name)) for call in calls] == [
        ("mkdir", "atomic"),
        ("mkdir", "spectra"),
        ("open", "atomic"),
        ("fsync", "atomic"),
        ("create", "file.new"),
        ("write", "file.new"),
        ("fsync", "file.new"),
        ("rename", "file.new"),
        ("open", "spectra"),
        ("fsync", "spectra"),
    ]
    (new,) = (call.new_path.name for call in calls if call.operation == "rename")
    assert new == "file"


def test_a_crash_at_any_call_leaves_a_whole_checkpoint_and_no_leftovers_for_long(outcomes):
    crashes = outcomes["crashes"]
    for operation, num in CRASHES:
        killed = [crashes[f"{operation} {at}"][0] for at in range(1, num + 1)]
        assert killed.count(True) >= max(1, num - 2), (operation, killed)
    assert all(left == [STEPS[3]] for _, _, *left in crashes.values())
    assert {latest for _, latest, *_ in crashes.values()} == {STEPS[1], STEPS[2]}


def test_the_same_command_goes_on_when_space_is_freed(corpora, tmp_path, monkeypatch):
    """Another program fills the disk while tensors are written."""
    (tmp_path / "run.toml").write_text(tiny_toml(corpora / "a", "switchlora"))
    command = ("train", "--config", tmp_path / "run.toml", "--training.steps", 6)
    command += ("--checkpoint.interval", 2, "--evaluation.interval", 3, "--job.output_dir")
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        write_data, saves = WRITER.write_data, []

        def fill_in_second_save(*args):
            saves.append(args)
            if len(saves) == 2:
                fill(disk, 100 << 10)
            return write_data(*args)

        monkeypatch.setattr(WRITER, "write_data", fill_in_second_save)
        run(*command, disk / "run").check_refused("cannot save step 4", "No space left on device")
        assert names_in(disk / "run" / "checkpoints") == [STEPS[2]]
        fill(disk)
        run(*command, disk / "run").check_refused(str(disk / "run"))
        verify(disk / "run" / "checkpoints" / STEPS[2])
        (disk / FILLER).unlink()
        assert run(*command, disk / "run").status == 0
        verify(disk / "run" / "checkpoints" / STEPS[6])
