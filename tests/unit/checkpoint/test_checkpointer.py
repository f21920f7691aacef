import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from switchtitan.checkpoint import Checkpointer, load_tensors_, read_metadata
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def save_and_finish(checkpointer: Checkpointer, step: int, tensors: dict[str, Tensor]) -> None:
    checkpointer.save(step, tensors, {})
    checkpointer.finish()


@pytest.mark.parametrize("async_save", [False, True])
def test_saved_state_loads_bitwise(make_checkpointer, tensors, async_save):
    checkpointer = make_checkpointer(async_save=async_save)
    checkpointer.save(1000, tensors, {"tokens_seen": 5})
    checkpointer.finish()
    assert checkpointer.latest is not None
    assert checkpointer.latest.name == "step-000001000"
    metadata = read_metadata(checkpointer.latest)
    assert (metadata.step, metadata.train_state) == (1000, {"tokens_seen": 5})
    assert metadata.identity == {"model": {"size": "9m"}, "corpus": "abc"}
    assert metadata.run["corpus"] == "a stand-in"
    assert metadata.versions == {"torch": "2.0"}
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load_tensors_(checkpointer.latest, found)
    assert_same(found, tensors)


def test_background_save_does_not_see_later_changes(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=True)
    before = copies(tensors)
    checkpointer.save(1, tensors, {})
    for tensor in tensors.values():
        tensor.fill_(99)
    checkpointer.finish()
    load_tensors_(checkpointer.latest, tensors)
    assert_same(tensors, before)


def test_poll_completes_a_background_save(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=True)
    checkpointer.poll()
    checkpointer.save(1, tensors, {})
    deadline = time.monotonic() + 60
    while checkpointer.latest is None and time.monotonic() < deadline:
        checkpointer.poll()
    assert checkpointer.latest is not None
    check_contents(checkpointer.latest)


def test_second_save_waits_for_the_first(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=True)
    checkpointer.save(1, tensors, {})
    checkpointer.save(2, tensors, {})
    assert checkpointer.latest.name == "step-000000001"
    checkpointer.finish()
    assert checkpointer.latest.name == "step-000000002"


def test_a_save_reuses_the_memory_of_the_previous_one_once_written(
    make_checkpointer, tensors, folder, monkeypatch
):
    checkpointer = make_checkpointer(async_save=True)
    may_write, places = threading.Event(), []
    write_data = ChecksummingWriter.write_data

    def write_when_allowed(writer, plan, planner):
        places.append({name: tensor.data_ptr() for name, tensor in planner.state_dict.items()})
        assert may_write.wait(60)
        return write_data(writer, plan, planner)

    monkeypatch.setattr(ChecksummingWriter, "write_data", write_when_allowed)
    expected = {
        1: copies(tensors),
        2: {name: torch.full_like(t, 99) for name, t in tensors.items()},
    }
    checkpointer.save(1, tensors, {})
    for tensor in tensors.values():
        tensor.fill_(99)
    second = threading.Thread(target=checkpointer.save, args=(2, tensors, {}))
    second.start()
    # Long enough to copy a few bytes, which must not have happened yet.
    second.join(timeout=0.5)
    assert second.is_alive()
    may_write.set()
    second.join(timeout=60)
    checkpointer.finish()
    for step, values in expected.items():
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        load_tensors_(folder / f"step-{step:09d}", found)
        assert_same(found, values)
    assert places[0] == places[1]
    assert not {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()} & set(
        places[0].values()
    )


def test_torchs_own_tool_reads_the_checkpoint(make_checkpointer, tensors, tmp_path):
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    dcp_to_torch_save(checkpointer.latest, tmp_path / "state.pt")
    found = torch.load(tmp_path / "state.pt", weights_only=True)
    assert_same(found, tensors)


@pytest.mark.parametrize("async_save", [False, True])
def test_full_disk_is_a_clear_error_and_leaves_older_checkpoints(
    make_checkpointer, tensors, folder, monkeypatch, async_save
):
    checkpointer = make_checkpointer(async_save=async_save)
    checkpointer.save(1, tensors, {})
    checkpointer.finish()

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ChecksummingWriter, "write_data", no_space)
    with pytest.raises(CheckpointError, match=r"cannot save step 2 .*No space left on device"):
        save_and_finish(checkpointer, 2, tensors)
    assert checkpointer.latest.name == "step-000000001"
    assert not (folder / "step-000000002").exists()
    check_contents(checkpointer.latest)
    monkeypatch.undo()
    checkpointer.save(2, tensors, {})
    checkpointer.finish()
    check_contents(folder / "step-000000002")


def test_too_little_space_is_refused_before_writing(make_checkpointer, folder):
    huge = {"weight": torch.empty(1).expand(1 << 50)}
    with pytest.raises(
        CheckpointError, match=r"cannot save step 1 .* 4 PiB, .* are free; free space"
    ):
        make_checkpointer().save(1, huge, {})
    assert list(folder.iterdir()) == []


def test_damage_between_writing_and_reading_back_is_found(
    make_checkpointer, tensors, folder, monkeypatch
):
    write_data = ChecksummingWriter.write_data

    def damage(writer, plan, planner):
        results = write_data(writer, plan, planner)
        path = Path(writer.path) / "__0_0.distcp"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return results

    monkeypatch.setattr(ChecksummingWriter, "write_data", damage)
    with pytest.raises(CheckpointError, match="differs from what was written when read back"):
        make_checkpointer(async_save=False).save(1, tensors, {})
    assert list(folder.iterdir()) == []


def test_leftovers_of_an_interrupted_save_are_replaced(make_checkpointer, tensors, folder):
    partial = folder / ".step-000000001.partial"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    check_contents(checkpointer.latest)
    assert not partial.exists()


def test_foreign_files_in_the_leftovers_are_never_deleted(make_checkpointer, tensors, folder):
    partial = folder / ".step-000000001.partial"
    partial.mkdir(parents=True)
    (partial / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        make_checkpointer(async_save=False).save(1, tensors, {})
    assert (partial / "notes.txt").read_text() == "mine"


def test_complete_checkpoint_is_never_overwritten(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {"tokens_seen": 1})
    with pytest.raises(CheckpointError, match="already exists"):
        checkpointer.save(1, tensors, {"tokens_seen": 2})
    assert read_metadata(checkpointer.latest).train_state == {"tokens_seen": 1}


def test_damaged_checkpoint_of_the_same_step_is_set_aside(
    make_checkpointer, tensors, folder, caplog
):
    damaged = folder / "step-000000001"
    damaged.mkdir(parents=True)
    (damaged / "__0_0.distcp").write_bytes(b"half")
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    check_contents(checkpointer.latest)
    aside = [path for path in folder.iterdir() if ".damaged-" in path.name]
    assert (aside[0] / "__0_0.distcp").read_bytes() == b"half"
    assert "not complete" in caplog.text


def test_a_checkpoint_skipped_on_resume_is_set_aside_when_its_step_is_saved(
    make_checkpointer, tensors, folder, caplog
):
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    checkpointer.save(2, tensors, {})
    file = folder / "step-000000002" / "__0_0.distcp"
    rotten = bytearray(file.read_bytes())
    rotten[len(rotten) // 2] ^= 1  # the length stays
    file.write_bytes(rotten)
    resumed = make_checkpointer(async_save=False)
    assert resumed.checkpoint_to_resume() == folder / "step-000000001"
    resumed.save(2, tensors, {})
    check_contents(folder / "step-000000002")
    (aside,) = (path for path in folder.iterdir() if ".damaged-" in path.name)
    assert (aside / "__0_0.distcp").read_bytes() == rotten


@pytest.fixture
def ctrl_c():
    """Restores Python's handler: a shell starts background processes with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_waiting_for_a_save_does_not_abort_it(
    make_checkpointer, tensors, folder, monkeypatch
):
    checkpointer = make_checkpointer(async_save=True)
    may_finish = threading.Event()
    finish = ChecksummingWriter.finish

    def finish_late(*args, **kwargs):
        assert may_finish.wait(timeout=60)
        finish(*args, **kwargs)

    monkeypatch.setattr(ChecksummingWriter, "finish", finish_late)
    checkpointer.save(1, tensors, {})

    def wait_until_interrupted():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        checkpointer.finish()

    with pytest.raises(KeyboardInterrupt):
        wait_until_interrupted()
    assert not (folder / "step-000000001").exists()
    may_finish.set()
    checkpointer.finish()
    assert checkpointer.latest == folder / "step-000000001"
    check_contents(checkpointer.latest)


def test_train_state_must_be_plain_values(make_checkpointer, tensors):
    with pytest.raises(TypeError, match="JSON serializable"):
        make_checkpointer().save(1, tensors, {"loss": torch.tensor(1.0)})


def test_resume_finds_the_newest_checkpoint_or_none(make_checkpointer, tensors, folder):
    assert make_checkpointer().checkpoint_to_resume() is None
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(9, tensors, {})
    checkpointer.save(10, tensors, {})
    assert make_checkpointer().checkpoint_to_resume() == folder / "step-000000010"
    with pytest.raises(CheckpointError, match="resume = 'auto'"):
        make_checkpointer(resume="never").checkpoint_to_resume()
