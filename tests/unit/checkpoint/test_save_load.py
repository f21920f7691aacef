"""What is saved is loaded bitwise. Saves that fail are in tests/ranks and tests/faults."""

import threading

import pytest
import torch
from support.checkpoints import refused, write_when
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.load import (
    find_checkpoint,
    load_tensors_,
    read_metadata,
    verify,
)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def loaded(checkpoint, like):
    found = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    load_tensors_(checkpoint, found)
    return found


@pytest.mark.parametrize("async_save", [False, True])
def test_saved_state_loads_bitwise(make_checkpointer, tensors, tmp_path, async_save):
    checkpointer = make_checkpointer(async_save=async_save)
    checkpointer.save(1000, tensors, {"tokens_seen": 5, "loss": float("inf")})
    checkpointer.finish()
    assert checkpointer.latest.name == "step-000001000"
    metadata = verify(checkpointer.latest)
    assert metadata == read_metadata(checkpointer.latest)
    assert (metadata.step, metadata.train_state["tokens_seen"]) == (1000, 5)
    assert metadata.identity == {"model": {"size": "9m", "betas": [0.9, 0.99]}}
    assert metadata.run["corpus"] == "a stand-in"
    assert metadata.versions == {"torch": "2.0"}
    assert_same(loaded(checkpointer.latest, tensors), tensors)
    dcp_to_torch_save(checkpointer.latest, tmp_path / "state.pt")
    assert_same(torch.load(tmp_path / "state.pt", weights_only=True), tensors)


def test_a_save_reuses_the_memory_of_the_previous_one_once_written(
    make_checkpointer, tensors, folder, monkeypatch
):
    """So the second save waits for the first, and neither sees later changes of the tensors."""
    checkpointer = make_checkpointer(async_save=True)
    may_write = threading.Event()
    places = write_when(may_write, monkeypatch)
    expected = {
        1: {name: tensor.clone() for name, tensor in tensors.items()},
        2: {name: torch.full_like(tensor, 99) for name, tensor in tensors.items()},
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
    assert find_checkpoint(folder, CheckpointConfig()) == folder / "step-000000001"
    make_checkpointer().save(2, tensors, {})
    verify(folder / "step-000000002")
    (aside,) = (path for path in folder.iterdir() if ".replaced-" in path.name)
    assert (aside / "__0_0.distcp").read_bytes() == rotten


def test_tensors_that_do_not_fit_are_named_before_anything_changes(saved, tensors):
    wanted = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    del wanted["optimizer.step"]
    wanted["model.new"] = torch.full((3,), 7.0)
    wanted["model.layers.0.weight"] = torch.full((7, 5), 7.0)
    wanted["model.norm.weight"] = torch.full((11,), 7.0)
    with refused("model.new", "optimizer.step", "float32 [7, 5]", "bfloat16 [11]", "float32 [11]"):
        load_tensors_(saved / "step-000000010", wanted)
    assert all((tensor == 7).all() for tensor in wanted.values())
