"""What is saved is loaded bitwise; a save that fails leaves earlier checkpoints as they were."""

import errno
import json
import os
import signal
import threading
import time

import pytest
import torch
from support.checkpoints import (
    change_index,
    damage_what_is_written,
    finish_when,
    read_tensors,
    refused,
    write_when,
    writes_fail,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from switchtitan.checkpoint import load_tensors_, read_metadata
from switchtitan.checkpoint.staging import HostCopies, own_share
from switchtitan.checkpoint.verify import check_contents, check_files


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
    check_contents(checkpointer.latest)


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
    finish_when(may_finish, monkeypatch)
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
    assert checkpointer.num_failed_saves == 0
    check_contents(checkpointer.latest)
    save_and_finish(2)
    check_contents(folder / "step-000000002")


def test_too_little_space_is_refused_before_writing(make_checkpointer, folder):
    huge = {"weight": torch.empty(1).expand(1 << 50)}
    with refused("step 1", "4 PiB"):
        make_checkpointer().save(1, huge, {})
    assert list(folder.iterdir()) == []


def test_damage_between_writing_and_reading_back_is_found(
    make_checkpointer, tensors, folder, monkeypatch
):
    damage_what_is_written(monkeypatch)
    with refused("step 1", "__0_0.distcp"):
        make_checkpointer().save(1, tensors, {})
    assert list(folder.iterdir()) == []


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
    check_contents(checkpointer.latest)
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
    check_contents(folder / "step-000000002")
    (aside,) = (path for path in folder.iterdir() if ".damaged-" in path.name)
    assert (aside / "__0_0.distcp").read_bytes() == rotten


def test_the_state_of_training_must_be_plain_values(make_checkpointer, tensors):
    with pytest.raises(TypeError):
        make_checkpointer().save(1, tensors, {"loss": torch.tensor(1.0)})


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


def test_a_short_file_is_an_error_before_anything_changes(saved, tensors):
    data = saved / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    wanted = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    with refused("__0_0.distcp"):
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


def overlap(tensor):
    """As many elements as the shape [5, 7] has, but row 1 twice and row 4 in no piece."""
    (piece,) = tensor["pieces"]
    tensor["pieces"] = [piece | {"sizes": [2, 7]}, piece | {"offsets": [1, 0], "sizes": [3, 7]}]


INDICES_THAT_DO_NOT_FIT = {
    "outside file": lambda tensor: tensor["pieces"][0].update(file="../../secret"),
    "far start": lambda tensor: tensor["pieces"][0].update(start=10**9),
    "no piece": lambda tensor: tensor["pieces"].clear(),
    "other shape": lambda tensor: tensor.update(shape=[5, 8]),
    "other place": lambda tensor: tensor["pieces"][0].update(offsets=[1, 0]),
    "piece twice": lambda tensor: tensor["pieces"].append(dict(tensor["pieces"][0])),
    "overlap": overlap,
    "short piece": lambda tensor: tensor["pieces"][0].update(num_bytes=8),
}


def change_entry(saved, change):
    index = json.loads((saved / "tensors.json").read_text())
    change(index["tensors"]["model.layers.0.weight"])
    change_index(saved, index)


@pytest.mark.parametrize("name", INDICES_THAT_DO_NOT_FIT)
def test_an_index_that_does_not_fit_is_refused_before_tensors_are_read(saved, name):
    change_entry(saved, INDICES_THAT_DO_NOT_FIT[name])
    with refused("model.layers.0.weight"):
        check_files(saved)


def test_an_unknown_dtype_is_refused(saved):
    change_entry(saved, lambda tensor: tensor.update(dtype="load"))
    with refused("'load'"):
        read_tensors(saved)


# Copies on the host.


def test_copies_reuse_their_memory_and_not_that_of_the_tensors(tensors):
    copy_to_host = HostCopies()
    first = copy_to_host(tensors)
    addresses = {name: tensor.data_ptr() for name, tensor in first.items()}
    for name, tensor in tensors.items():
        assert torch.equal(first[name], tensor)
        assert tensor.numel() == 0 or addresses[name] != tensor.data_ptr()
        tensor.fill_(9)
        assert tensor.numel() == 0 or not torch.equal(first[name], tensor)
    second = copy_to_host(tensors)
    assert {name: tensor.data_ptr() for name, tensor in second.items()} == addresses


def test_a_part_of_a_storage_needs_memory_of_its_own_size():
    matrices = torch.arange(24.0).view(8, 3)
    some = {"second": matrices[1], "seventh": matrices[6]}
    copy_to_host = HostCopies()
    copies = copy_to_host(some)
    # 12 bytes, which end at a multiple of 16, and 12 more.
    assert {copy.untyped_storage().nbytes() for copy in copies.values()} == {16 + 12}
    matrices += 1
    assert torch.equal(copies["seventh"], torch.arange(18.0, 21.0))
    assert torch.equal(copy_to_host(some)["seventh"], torch.arange(19.0, 22.0))


def test_copies_of_all_dtypes_are_aligned_and_not_differentiated():
    dtypes = (torch.bool, torch.int64, torch.bfloat16, torch.float32, torch.uint8, torch.float64)
    tensors = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "column": torch.arange(15.0).view(5, 3)[:, 1:2]}
    tensors["weight"] = torch.nn.Parameter(torch.ones(3))
    copies = HostCopies()(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(copies[name], tensor), name
        assert copies[name].dtype == tensor.dtype
        assert copies[name].data_ptr() % 16 == 0, name
        assert not copies[name].requires_grad


def test_memory_follows_the_tensors():
    copy_to_host = HostCopies()
    first = copy_to_host({"a": torch.arange(5.0)})
    # Such as optimizer state that does not exist before the first step.
    more = copy_to_host({"a": torch.arange(5.0) + 1, "b": torch.arange(4)})
    assert torch.equal(more["a"], torch.arange(1.0, 6.0))
    assert torch.equal(more["b"], torch.arange(4))
    # A save in progress may still read them.
    assert torch.equal(first["a"], torch.arange(5.0))
    other_dtype = copy_to_host({"a": torch.arange(5), "b": torch.arange(4)})
    assert torch.equal(other_dtype["a"], torch.arange(5))


@pytest.mark.gpu
def test_copies_of_a_gpu_s_tensors_are_page_locked_while_they_are_used():
    matrices = torch.arange(4 * 32 * 5461.0, device="cuda").view(4, 32, 5461)
    copy_to_host = HostCopies()
    for _ in range(2):
        copies = copy_to_host({"first": matrices[0], "last": matrices[3], "host": torch.ones(3)})
        assert torch.equal(copies["last"], matrices[3].cpu())
        assert copies["first"].untyped_storage().nbytes() == 2 * matrices[0].nbytes
        assert copies["first"].is_pinned()
        assert not copies["host"].is_pinned()
        matrices += 1
    del copy_to_host
    assert not copies["first"].is_pinned()


def test_a_single_process_saves_everything(tensors):
    assert own_share(tensors) == tensors
