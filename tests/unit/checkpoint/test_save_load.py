"""What is saved is loaded bitwise; a save that fails leaves earlier checkpoints as they were."""

import errno
import os
import signal
import threading
import time

import pytest
import torch
from support.checkpoints import (
    read_tensors,
    refused,
    write_when,
    writes_fail,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from switchtitan.checkpoint import load_tensors_, read_metadata, verify
from switchtitan.checkpoint.tensors import HostMemory


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def loaded(checkpoint, like):
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load_tensors_(checkpoint, found)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


# Saves.


@pytest.mark.parametrize("async_save", [False, True])
def test_saved_state_loads_bitwise(make_checkpointer, tensors, async_save):
    checkpointer = make_checkpointer(async_save=async_save)
    checkpointer.save(1000, tensors, {"tokens_seen": 5})
    checkpointer.finish()
    assert checkpointer.latest.name == "step-000001000"
    metadata = read_metadata(checkpointer.latest)
    assert (metadata.step, metadata.train_state) == (1000, {"tokens_seen": 5})
    assert metadata.identity == {"model": {"size": "9m"}, "corpus": "abc"}
    assert metadata.run["corpus"] == "a stand-in"
    assert metadata.versions == {"torch": "2.0"}
    assert_same(loaded(checkpointer.latest, tensors), tensors)


def test_torchs_own_tool_reads_the_checkpoint(make_checkpointer, tensors, tmp_path):
    checkpointer = make_checkpointer()
    checkpointer.save(1, tensors, {})
    dcp_to_torch_save(checkpointer.latest, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), tensors)


def test_poll_completes_a_background_save(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=True)
    checkpointer.poll()
    checkpointer.save(1, tensors, {})
    deadline = time.monotonic() + 60
    while checkpointer.latest is None and time.monotonic() < deadline:
        checkpointer.poll()
    verify(checkpointer.latest)


def test_a_save_reuses_the_memory_of_the_previous_one_once_written(
    make_checkpointer, tensors, folder, monkeypatch
):
    """So the second save waits for the first, and neither sees later changes of the tensors."""
    checkpointer = make_checkpointer(async_save=True)
    may_write = threading.Event()
    places = write_when(may_write, monkeypatch)
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
        assert_same(loaded(folder / f"step-{step:09d}", tensors), values)
    assert places[0] == places[1]
    own = {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
    assert not own & set(places[0].values())


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
    write_when(may_finish, monkeypatch)
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
    verify(checkpointer.latest)


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_is_an_error_and_leaves_older_checkpoints(
    make_checkpointer, tensors, folder, monkeypatch, async_save
):
    def save_and_finish(step):
        checkpointer.save(step, tensors, {})
        checkpointer.finish()

    checkpointer = make_checkpointer(async_save=async_save)
    save_and_finish(1)
    with monkeypatch.context() as planted, refused("step 2", "No space left on device"):
        writes_fail(errno.ENOSPC, planted)
        save_and_finish(2)
    assert [path.name for path in folder.iterdir()] == ["step-000000001"]
    verify(checkpointer.latest)
    save_and_finish(2)
    verify(folder / "step-000000002")


def test_leftovers_of_an_interrupted_save_are_replaced_unless_they_hold_other_files(
    make_checkpointer, tensors, folder
):
    partial = folder / ".step-000000001.partial"
    partial.mkdir(parents=True)
    (partial / "__0_0.distcp").write_bytes(b"half")
    (partial / "notes.txt").write_text("mine")
    checkpointer = make_checkpointer()
    with refused("step 1", ".step-000000001.partial"):
        checkpointer.save(1, tensors, {})
    (partial / "notes.txt").unlink()
    checkpointer.save(1, tensors, {})
    verify(checkpointer.latest)
    assert not partial.exists()


def test_a_complete_checkpoint_is_never_overwritten(make_checkpointer, tensors):
    checkpointer = make_checkpointer()
    checkpointer.save(1, tensors, {"tokens_seen": 1})
    with refused("step-000000001"):
        checkpointer.save(1, tensors, {"tokens_seen": 2})
    assert read_metadata(checkpointer.latest).train_state == {"tokens_seen": 1}


def test_a_checkpoint_skipped_on_resume_is_set_aside_when_its_step_is_saved(
    make_checkpointer, tensors, folder
):
    checkpointer = make_checkpointer()
    checkpointer.save(1, tensors, {})
    checkpointer.save(2, tensors, {})
    file = folder / "step-000000002" / "__0_0.distcp"
    rotten = bytearray(file.read_bytes())
    rotten[len(rotten) // 2] ^= 1  # the length stays
    file.write_bytes(rotten)
    resumed = make_checkpointer()
    assert resumed.checkpoint_to_resume() == folder / "step-000000001"
    resumed.save(2, tensors, {})
    verify(folder / "step-000000002")
    (aside,) = (path for path in folder.iterdir() if ".damaged-" in path.name)
    assert (aside / "__0_0.distcp").read_bytes() == rotten


# Loads.


@pytest.fixture
def saved(make_checkpointer, tensors):
    checkpointer = make_checkpointer()
    checkpointer.save(1, tensors, {})
    return checkpointer.latest


def test_tensors_that_do_not_fit_are_named_before_anything_changes(saved, tensors):
    wanted = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    del wanted["optimizer.step"]
    wanted["model.new"] = torch.full((3,), 7.0)
    wanted["model.layers.0.weight"] = torch.full((7, 5), 7.0)
    wanted["model.norm.weight"] = torch.full((11,), 7.0)
    with refused("model.new", "optimizer.step", "float32 [7, 5]", "bfloat16 [11]", "float32 [11]"):
        load_tensors_(saved, wanted)
    assert all((tensor == 7).all() for tensor in wanted.values())


def test_parameters_are_filled_in_place(saved, tensors):
    parameter = torch.nn.Parameter(torch.zeros(5, 7))
    address = parameter.data_ptr()
    load_tensors_(saved, tensors | {"model.layers.0.weight": parameter})
    assert parameter.data_ptr() == address
    assert torch.equal(parameter, tensors["model.layers.0.weight"])
    assert parameter.requires_grad


def test_tensors_are_read_by_prefix(saved, tensors):
    found = read_tensors(saved, "model.")
    assert found.keys() == {"layers.0.weight", "norm.weight"}
    assert torch.equal(found["norm.weight"], tensors["model.norm.weight"])
    with refused("'nothing'"):
        read_tensors(saved, "nothing")


# Copies on the host.


def test_copies_reuse_their_memory_and_not_that_of_the_tensors(tensors):
    memory = HostMemory()
    first = memory.copy(tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    for name, tensor in tensors.items():
        assert torch.equal(first[name], tensor)
        assert tensor.numel() == 0 or addresses[name] != tensor.data_ptr()
        tensor.fill_(9)
        assert tensor.numel() == 0 or not torch.equal(first[name], tensor)
    second = memory.copy(tensors)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses


def test_copies_of_all_dtypes_are_aligned_and_follow_the_tensors():
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.uint8, torch.float64)
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "column": torch.arange(15.0).view(5, 3)[:, 1:2]}
    tensors["weight"] = torch.nn.Parameter(torch.ones(3))
    memory = HostMemory()
    first = memory.copy({"scalar": tensors["scalar"]})
    copies = memory.copy(tensors)
    assert_same(copies, tensors)
    assert all(copy.data_ptr() % 16 == 0 for copy in copies.values())
    assert not copies["weight"].requires_grad
    # A save in progress may still read them.
    assert first["scalar"] == 3.5


@pytest.mark.gpu
def test_copies_of_a_gpu_s_tensors_are_page_locked_while_they_are_used():
    matrices = torch.arange(4 * 32 * 5461.0, device="cuda").view(4, 32, 5461)
    memory = HostMemory()
    for _ in range(2):
        copies = memory.copy({"first": matrices[0], "last": matrices[3], "host": torch.ones(3)})
        assert torch.equal(copies["last"], matrices[3].cpu())
        assert copies["first"].untyped_storage().nbytes() == 2 * matrices[0].nbytes + 12
        assert copies["first"].is_pinned()
        matrices += 1
    del memory
    assert not copies["first"].is_pinned()
