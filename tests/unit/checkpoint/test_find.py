import logging
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import rewrite_metadata

from switchtitan.checkpoint import (
    check_output_folder,
    find_all,
    find_checkpoint,
    find_given,
    find_latest,
)
from switchtitan.checkpoint.metadata import FORMAT_VERSION
from switchtitan.errors import CheckpointError, CheckpointFormatError


@pytest.fixture
def saved(make_checkpointer, tensors, folder):
    """A folder with complete checkpoints of steps 1, 2 and 10."""
    checkpointer = make_checkpointer(async_save=False, keep_latest=0)
    for step in (1, 2, 10):
        checkpointer.save(step, tensors, {})
    return folder


def test_missing_folder_has_no_checkpoint(folder):
    assert find_latest(folder) is None
    assert find_checkpoint(folder, "auto") is None


def test_newest_is_found_by_number_and_logged(saved, caplog):
    with caplog.at_level(logging.INFO, logger="switchtitan.checkpoint.find"):
        assert find_latest(saved) == saved / "step-000000010"
    assert "step-000000010" in caplog.text


def test_partial_and_foreign_folders_are_no_checkpoints(saved):
    (saved / ".step-000000099.partial").mkdir()
    (saved / "step-000000099").write_text("a file")
    (saved / "step-final").mkdir()
    assert find_latest(saved).name == "step-000000010"


@pytest.mark.parametrize(
    "damage", ["flipped byte", "short file", "no file", "no metadata", "bad metadata"]
)
def test_damaged_checkpoints_are_skipped_with_the_reason(saved, damage, caplog):
    newest = saved / "step-000000010"
    data = newest / "__0_0.distcp"
    if damage == "flipped byte":
        contents = bytearray(data.read_bytes())
        contents[77] ^= 1
        data.write_bytes(contents)
    elif damage == "short file":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "no file":
        data.unlink()
    elif damage == "no metadata":
        (newest / "metadata.json").unlink()
    else:
        (newest / "metadata.json").write_text('{"format_version": 1')
    assert find_latest(saved).name == "step-000000002"
    assert "incomplete" in caplog.text
    assert "step-000000010" in caplog.text


def test_damaged_checkpoints_alone_do_not_start_a_new_run(saved):
    for path in saved.iterdir():
        (path / "tensors.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints .* is complete"):
        find_checkpoint(saved, "auto")


def test_path_can_be_a_checkpoint_a_folder_or_a_run(saved):
    assert find_given(saved / "step-000000002").name == "step-000000002"
    assert find_given(saved).name == "step-000000010"
    assert find_given(saved.parent).name == "step-000000010"
    with pytest.raises(CheckpointError, match=r"no complete checkpoint at .*nowhere"):
        find_given(saved / "nowhere")


def test_given_damaged_checkpoint_is_an_error(saved):
    (saved / "step-000000002" / "tensors.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tensors.json has 2 bytes, expected"):
        find_given(saved / "step-000000002")


def set_format(checkpoint: Path, version: int) -> None:
    rewrite_metadata(checkpoint, lambda metadata: metadata.update(format_version=version))


def test_formats_before_the_checksum_of_metadata_are_read(saved):
    newest = saved / "step-000000010"
    set_format(newest, 2)
    assert not (newest / "metadata.json.sha256").exists()
    assert find_given(saved).name == "step-000000010"


def test_format_1_is_read_if_it_holds_no_transposed_tensor(saved):
    set_format(saved / "step-000000010", 1)
    assert find_given(saved).name == "step-000000010"


@pytest.mark.parametrize(
    ("version", "reader"), [(1, "0.1"), (FORMAT_VERSION + 1, "of the version that wrote it")]
)
@pytest.mark.parametrize("find", ["checkpoint", "folder", "run", "auto"])
def test_checkpoint_of_another_format_is_refused_and_untouched(
    make_checkpointer, tensors, folder, caplog, version, reader, find
):
    """B is transposed in format 1: it is refused even if all shapes match."""
    checkpointer = make_checkpointer(async_save=False, keep_latest=0)
    tensors["model.layers.0.lora_b"] = torch.ones(3, 3)
    checkpointer.save(1, tensors, {})
    checkpointer.save(2, tensors, {})
    newest = folder / "step-000000002"
    set_format(newest, version)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    paths = {"checkpoint": newest, "folder": folder, "run": folder.parent}
    resume = str(paths.get(find, "auto"))
    caplog.clear()
    with pytest.raises(
        CheckpointFormatError,
        match=rf"has format {version}, .* reads format {FORMAT_VERSION}; .* switchtitan {reader}, "
        r"or start a new run in another \[job\] output_dir$",
    ):
        find_checkpoint(folder, resume)
    with pytest.raises(CheckpointError, match=rf"has format {version}, "):
        checkpointer.save(2, tensors, {})
    assert not caplog.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_pruning_keeps_a_checkpoint_of_another_format(make_checkpointer, tensors, folder, caplog):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    checkpointer.save(1, tensors, {})
    set_format(folder / "step-000000001", FORMAT_VERSION + 1)
    checkpointer.save(2, tensors, {})
    assert (folder / "step-000000001").is_dir()
    assert "not deleting a checkpoint of another format" in caplog.text


def test_new_run_may_not_mix_with_checkpoints(saved, folder):
    with pytest.raises(
        CheckpointError, match=r"already holds 3 checkpoints.*output_dir.*move.*auto"
    ):
        check_output_folder(saved, "never")


@pytest.mark.parametrize("resume", ["auto", "never", "elsewhere"])
def test_empty_or_missing_folder_is_accepted(folder, resume):
    check_output_folder(folder, resume)
    folder.mkdir(parents=True)
    check_output_folder(folder, resume)


def test_resuming_from_elsewhere_may_not_mix_with_checkpoints(saved, tmp_path):
    other = tmp_path / "other" / "step-000000001"
    shutil.copytree(saved / "step-000000001", other)
    with pytest.raises(CheckpointError, match="is outside"):
        check_output_folder(saved, str(other))
    check_output_folder(tmp_path / "third", str(other))


def test_resuming_from_an_older_checkpoint_may_not_mix_with_newer_ones(saved):
    with pytest.raises(CheckpointError, match="holds the newer step-000000010"):
        check_output_folder(saved, str(saved / "step-000000002"))
    check_output_folder(saved, str(saved / "step-000000010"))
    check_output_folder(saved, str(saved))
    check_output_folder(saved, str(saved.parent))


def test_all_complete_checkpoints_are_found_oldest_first(saved, caplog):
    expected = [saved / f"step-{step:09d}" for step in (1, 2, 10)]
    assert find_all(saved) == expected
    assert find_all(expected[1]) == [expected[1]]
    (expected[1] / "__0_0.distcp").unlink()
    assert find_all(saved) == [expected[0], expected[2]]
    assert "skipping an incomplete checkpoint" in caplog.text


def test_a_folder_without_checkpoints_has_none_to_find(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint at"):
        find_all(tmp_path)
