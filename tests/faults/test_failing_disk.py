"""A disk that fails or fills up: earlier checkpoints stay whole, and training can go on."""

import errno
import json
import logging
import os
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_tensors, refused, writes_fail
from support.commands import run
from support.disk_faults import CASES, METRICS, OF_FIRST_RANK, OF_SECOND_RANK, Case
from support.failing_disk import (
    Call,
    Fault,
    build,
    call_preloaded,
    folder_in_memory,
    logged_calls,
    preloaded,
    set_faults,
)
from support.ranks import run_on_ranks
from support.small_disk import Filler, small_disk
from support.tiny import METHOD_KEYS, TINY, full_tensors, tiny_trainer

from switchtitan.checkpoint import CheckpointConfig, Checkpointer
from switchtitan.checkpoint.find import find_latest
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents
from switchtitan.files import make_folder, write_atomically
from switchtitan.observability import FAILED_SAVES
from switchtitan.training.stop import Stop, Stopped

STEPS = {step: f"step-{step:09d}" for step in range(1, 9)}


@contextmanager
def logged():
    """Yields a list of what is logged."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("switchtitan").addHandler(handler)
    yield lines
    logging.getLogger("switchtitan").removeHandler(handler)


# Every call of a save fails, in one process.


def tensors_of(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "weight": torch.randn(50, 71, generator=generator),
        "norm": torch.randn(11, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(step),
    }


def make_checkpointer(folder, **config):
    return Checkpointer(
        folder,
        CheckpointConfig(**{"async_save": False, **config}),
        identity={"model": "tiny"},
        metadata={},
        is_main=True,
        group=None,
        background_group=None,
    )


def save(checkpointer, step):
    checkpointer.save(step, tensors_of(step), {"tokens_seen": step})
    checkpointer.finish()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def is_whole(checkpoint, step):
    metadata, found = check_contents(checkpoint), read_tensors(checkpoint)
    return metadata.step == step and all(
        torch.equal(found[name], tensor) for name, tensor in tensors_of(step).items()
    )


def save_with_all_faults(folder):
    """Runs in a process with the library: all cases, the order of calls, and crashes."""
    outcomes = {
        name: save_with_a_fault(folder / str(index) / "checkpoints", name, index % 2 == 0)
        for index, name in enumerate(CASES)
    }
    outcomes["unreadable"] = skip_an_unreadable_checkpoint(folder)
    outcomes["calls"] = calls_of_saves(folder)
    outcomes["atomic calls"] = calls_of_an_atomic_write(folder)
    outcomes["crashes"] = crash_at_each_call(folder)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


def save_with_a_fault(home, name, is_async):
    """Saves steps 1, 2 and 3; the second save meets the fault."""
    checkpointer = make_checkpointer(
        home, async_save=is_async, on_failure="continue", keep_latest=1 if "prun" in name else 2
    )
    save(checkpointer, 1)
    with logged() as lines:
        set_faults(*CASES[name].faults)
        save(checkpointer, 2)
        set_faults()
    outcome = {
        "num_failed": checkpointer.num_failed_saves,
        "latest": checkpointer.latest.name,
        "messages": "\n".join(lines),
        "after": names(home),
        "visible": [path for path in names(home) if re.fullmatch(r"step-\d+", path)],
    }
    outcome["whole"] = [path for path in outcome["visible"] if is_whole(home / path, int(path[5:]))]
    save(checkpointer, 3)
    outcome["at the end"] = names(home)
    outcome["is the last whole"] = is_whole(checkpointer.latest, 3)
    return outcome


def calls_of_saves(folder):
    """The calls of two saves in a new folder, the second of which deletes the first."""
    home = folder / "calls" / "run" / "checkpoints"
    checkpointer = make_checkpointer(home, keep_latest=1)
    with logged_calls(folder / "calls.log", f"{folder}/calls*") as calls:
        save(checkpointer, 1)
        save(checkpointer, 2)
    return [
        [call.operation, str(call.path), call.new_path and str(call.new_path)] for call in calls
    ]


def calls_of_an_atomic_write(folder):
    with logged_calls(folder / "atomic.log", f"{folder}/atomic*") as calls:
        make_folder(folder / "atomic" / "spectra")
        write_atomically(folder / "atomic" / "spectra" / "file", "contents")
    return [
        [
            call.operation,
            re.sub(r"\.\d+-[0-9a-f]+\.new$", ".new", call.path.name),
            call.new_path and call.new_path.name,
        ]
        for call in calls
    ]


def skip_an_unreadable_checkpoint(folder):
    """The disk of the newest checkpoint has a bad sector."""
    home = folder / "unreadable" / "checkpoints"
    for step in (1, 2):
        save(make_checkpointer(home), step)
    with logged() as lines:
        set_faults(Fault("read", f"{home}/{STEPS[2]}/*.distcp", "EIO"))
        found = make_checkpointer(home).checkpoint_to_resume()
        set_faults()
    return [found.name, *lines]


CRASHES = [("fsync", 9), ("create", 6), ("write", 6), ("rename", 3), ("unlink", 6), ("mkdir", 1)]
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
            assert is_whole(latest, int(latest.name[5:]))
            resumed = make_checkpointer(home, keep_latest=1)
            assert resumed.checkpoint_to_resume() == latest
            save(resumed, 3)
            assert is_whole(resumed.latest, 3)
            results[f"{operation} {at}"] = [killed, latest.name, *names(home)]
    return results


@pytest.fixture(scope="module")
def outcomes():
    with folder_in_memory() as folder:
        call_preloaded(build(folder), save_with_all_faults, folder)
        return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_fault_leaves_earlier_checkpoints_whole_and_nothing_after_the_next_save(outcomes, name):
    case, outcome = CASES[name], outcomes[name]
    assert outcome["num_failed"] == (not case.is_saved)
    assert outcome["latest"] == STEPS[2 if case.is_saved else 1]
    assert outcome["whole"] == outcome["visible"]
    expected = [STEPS[1], STEPS[2]] if case.is_saved or case.is_visible else [STEPS[1]]
    if "prun" in name and not name.startswith("rename"):
        expected = [STEPS[2]]
    assert outcome["visible"] == expected
    assert sorted(set(outcome["after"]) - set(expected)) == ([case.leaves] if case.leaves else [])
    assert re.search(case.message, outcome["messages"]), outcome["messages"]
    if not case.is_saved:
        assert "cannot save step 2" in outcome["messages"]
        assert re.search(f"newest complete checkpoint is .*{STEPS[1]}", outcome["messages"])
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

    def places(operation, path):
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
    found, *lines = outcomes["unreadable"]
    assert found == STEPS[1]
    assert any(STEPS[2] in line and "Input/output error" in line for line in lines)


def test_a_crash_at_any_call_leaves_a_whole_checkpoint_and_no_leftovers_for_long(outcomes):
    crashes = outcomes["crashes"]
    for operation, num in CRASHES:
        killed = [crashes[f"{operation} {at}"][0] for at in range(1, num + 1)]
        assert killed.count(True) >= max(1, num - 2), (operation, killed)
    assert all(left == [STEPS[3]] for _, _, *left in crashes.values())
    assert {latest for _, latest, *_ in crashes.values()} == {STEPS[1], STEPS[2]}


# Training on two ranks, of which one has a failing disk.


def trainer_of(folder, num_steps, on_failure="continue", num_ranks=2):
    return tiny_trainer(
        folder,
        "switchlora",
        *("--training.steps", str(num_steps)),
        *("--checkpoint.interval", "1"),
        *("--checkpoint.async_save", "true"),
        *("--checkpoint.on_failure", on_failure),
        *("--metrics.tensorboard", "true"),
        *("--spectrum.interval", "4"),
        num_ranks=num_ranks,
    )


def inject(trainer, has_faults, cases):
    """Each save of a rank that has faults meets the next case."""
    save, remaining = trainer.checkpointer.save, iter(cases)

    def save_on_failing_disk(*args):
        trainer.checkpointer.finish()
        case = next(remaining, None)
        if has_faults:
            set_faults(*(case.faults if case else ()))
        save(*args)

    trainer.checkpointer.save = save_on_failing_disk


def train(folder, num_steps, has_faults=False, cases=()):
    """Returns the trainer, all tensors, the results, and what was logged."""
    trainer = trainer_of(folder, num_steps)
    inject(trainer, has_faults, cases)
    with logged() as lines:
        trainer.train()
    tensors = full_tensors(trainer)  # waits for the main rank, which has written its results
    results = json.loads((folder / "run" / "results.json").read_text())
    return trainer, tensors, results, "\n".join(lines)


def train_on_failing_disks(rank, folder):
    of_ranks = [(*METRICS, *OF_FIRST_RANK), OF_SECOND_RANK]
    num_steps = max(map(len, of_ranks)) + 1
    _, expected, healthy, _ = train(folder / "healthy", num_steps)
    assert FAILED_SAVES not in healthy
    for failing_rank, cases in enumerate(of_ranks):
        home = folder / f"failing-{failing_rank}"
        trainer, found, results, lines = train(home, num_steps, rank == failing_rank, cases)
        num_failed = sum(not case.is_saved for case in cases)
        assert trainer.checkpointer.num_failed_saves == num_failed
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        last = home / "run" / "checkpoints" / f"step-{num_steps:09d}"
        assert trainer.checkpointer.latest == last
        check_contents(last)
        assert lines.count("Training continues") == (num_failed if rank == 0 else 0)
        if rank == 0:
            saved = read_tensors(last)
            assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
            assert results[FAILED_SAVES] == num_failed
            assert results["loss/validation"] == healthy["loss/validation"]
    fail_to_the_end(rank, folder)


def fail_to_the_end(rank, folder):
    """The disk of the second rank fails, in every save or in the last one."""
    fault = Case((Fault("write", "*.partial/__1_0.distcp", "ENOSPC", times=0),))
    stop = trainer_of(folder / "stop", 4, on_failure="stop")
    inject(stop, rank == 1, [Case(()), fault])
    with refused("cannot save step 2", "No space left on device"):
        stop.train()
    assert stop.checkpointer.latest.name == STEPS[1]
    # Found by the poll or the save of the next step.
    assert stop.stepper.state.step in (2, 3)
    last = trainer_of(folder / "last", 3)
    # The last step is saved again.
    inject(last, rank == 1, [Case(()), fault, fault, fault])
    with refused("the last checkpoint was not saved", STEPS[1], "cannot save step 3"):
        last.train()
    set_faults()
    again = trainer_of(folder / "last", 3)
    assert again.stepper.state.step == 1
    again.train()
    assert again.checkpointer.latest.name == STEPS[3]


def test_training_goes_on_and_its_weights_are_those_of_a_healthy_disk(corpora):
    folder = corpora / "failing-disk"
    folder.mkdir()
    with preloaded(build(folder)):
        run_on_ranks(2, train_on_failing_disks, folder, start_method="spawn")


# A run that ends after a failed save.

INTERVAL, STOPPED_AT, NUM_STEPS = 2, 4, 6


class StopAfter(Stop):
    """A signal arrives in a step."""

    def __init__(self, trainer, step):
        super().__init__()
        self._state, self._step = trainer.stepper.state, step

    def is_due(self):
        return signal.SIGTERM if self._state.step == self._step else None


class SignalAfterLastStep(Stop):
    @contextmanager
    def steps(self, describe_checkpoint):
        yield
        raise Stopped(signal.SIGTERM)


def build_run(folder, is_async="false", stop_after=None):
    keys = ("--training.steps", str(NUM_STEPS), "--checkpoint.interval", str(INTERVAL))
    keys += ("--checkpoint.on_failure", "continue", "--checkpoint.async_save", is_async)
    trainer = tiny_trainer(folder, "switchlora", *keys)
    if stop_after is not None:
        trainer.stop = StopAfter(trainer, stop_after)
    return trainer


def check_saved(folder, step):
    newest = max((folder / "run" / "checkpoints").iterdir())
    assert check_contents(newest).step == step


@pytest.mark.parametrize(
    ("failing", "stop_after", "is_async", "saved", "num_failed"),
    [
        (2, STOPPED_AT, "false", STOPPED_AT, 1),
        (2, STOPPED_AT, "true", STOPPED_AT, 1),
        (2, STOPPED_AT + 1, "true", STOPPED_AT + 1, 1),
        # A stop after a save saves nothing again.
        (3, STOPPED_AT, "false", STOPPED_AT, 0),
        (3, None, "true", NUM_STEPS, 1),
    ],
)
def test_the_step_at_which_a_run_ends_is_saved_again(
    corpora, tmp_path, monkeypatch, failing, stop_after, is_async, saved, num_failed
):
    folder = corpora / tmp_path.name
    trainer = build_run(folder, is_async, stop_after)
    writes_fail(errno.ENOSPC, monkeypatch, saves=(failing,))
    if stop_after is None:
        trainer.train()
    else:
        with pytest.raises(Stopped):
            trainer.train()
    assert trainer.checkpointer.num_failed_saves == num_failed
    check_saved(folder, saved)


@pytest.mark.parametrize("is_stopped", [True, False], ids=["stopped", "after the last step"])
def test_a_run_that_cannot_save_its_last_step_ends_with_an_error(
    corpora, tmp_path, monkeypatch, is_stopped
):
    folder = corpora / tmp_path.name
    trainer = build_run(folder, stop_after=STOPPED_AT if is_stopped else None)
    if not is_stopped:
        trainer.stop = SignalAfterLastStep()
    writes_fail(errno.ENOSPC, monkeypatch, saves=(2, 3) if is_stopped else (3, 4))
    step = STOPPED_AT if is_stopped else NUM_STEPS
    with refused("the last checkpoint was not saved", f"cannot save step {step}"):
        trainer.train()
    check_saved(folder, step - INTERVAL)


# A real disk.


def test_the_same_command_goes_on_when_space_is_freed(corpora, tmp_path, monkeypatch):
    """Another program fills the disk while tensors are written."""
    text = TINY.format(
        folder=corpora / "a", method="switchlora", method_keys=METHOD_KEYS["switchlora"]
    )
    (tmp_path / "run.toml").write_text(text)
    command = ("train", "--config", tmp_path / "run.toml", "--training.steps", 6)
    command += ("--checkpoint.interval", 2, "--evaluation.interval", 3, "--job.output_dir")

    def tensors_at(output_dir, step):
        saved = check_contents(output_dir / "checkpoints" / STEPS[step])
        return {name: file.sha256 for name, file in saved.files.items() if "distcp" in name}

    assert run(*command, tmp_path / "large").status == 0
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        filler, write_data, saves = Filler(disk), ChecksummingWriter.write_data, []

        def fill_in_second_save(*args):
            saves.append(args)
            if len(saves) == 2:
                filler.fill(100 << 10)
            return write_data(*args)

        monkeypatch.setattr(ChecksummingWriter, "write_data", fill_in_second_save)
        run(*command, disk / "run").check_refused("cannot save step 4", "are free")
        assert names(disk / "run" / "checkpoints") == [STEPS[2]]
        filler.fill()
        run(*command, disk / "run").check_refused(str(disk / "run"))
        assert tensors_at(disk / "run", 2)
        filler.free()
        assert run(*command, disk / "run").status == 0
        assert tensors_at(disk / "run", 6) == tensors_at(tmp_path / "large", 6)
