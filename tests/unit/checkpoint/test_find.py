"""The checkpoint to resume from, those of other runs and formats, and those to delete."""

import json
import shutil

import pytest
from support.checkpoints import SUMS, refused, rewrite_metadata

from switchtitan.checkpoint import (
    CheckpointConfig,
    check_given_paths,
    check_same_run,
    find_checkpoint,
    find_given,
    find_latest,
)
from switchtitan.errors import CheckpointError, CheckpointFormatError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_steps(checkpointer, tensors, *steps):
    for step in steps:
        checkpointer.save(step, tensors, {})


@pytest.fixture
def saved(make_checkpointer, tensors, folder):
    """A folder with complete checkpoints of steps 1, 2 and 10."""
    save_steps(make_checkpointer(keep_latest=0), tensors, 1, 2, 10)
    return folder


# The checkpoint to resume from.


def test_resume_finds_the_newest_checkpoint_or_none(make_checkpointer, saved, tmp_path):
    assert find_latest(tmp_path / "nowhere") is None
    for resume in ("auto", "never"):
        assert find_checkpoint(tmp_path / "nowhere", resume) is None
    checkpointer = make_checkpointer()
    assert checkpointer.resume_point is None
    assert checkpointer.checkpoint_to_resume() == saved / "step-000000010"
    assert checkpointer.resume_point == saved / "step-000000010"


def test_partial_and_foreign_folders_are_no_checkpoints(saved):
    (saved / ".step-000000099.partial").mkdir()
    (saved / "step-000000099").write_text("a file")
    (saved / "step-final").mkdir()
    assert find_latest(saved).name == "step-000000010"


def test_damaged_checkpoints_are_skipped_and_alone_do_not_start_a_new_run(saved, caplog):
    (saved / "step-000000010" / "metadata.json").unlink()
    assert find_latest(saved).name == "step-000000002"
    assert "step-000000010: cannot read metadata.json" in caplog.text
    for path in saved.iterdir():
        (path / ".metadata").unlink()
    with refused("resume = 'auto'", str(saved)):
        find_checkpoint(saved, "auto")


def test_a_path_can_be_a_checkpoint_a_folder_or_a_run(saved):
    assert find_given(saved / "step-000000002").name == "step-000000002"
    assert find_given(saved).name == "step-000000010"
    assert find_given(saved.parent).name == "step-000000010"
    with refused("nowhere"):
        find_given(saved / "nowhere")
    (saved / "step-000000002" / ".metadata").write_bytes(b"")
    with refused(".metadata", "corrupted"):
        find_given(saved / "step-000000002")


def test_given_paths_that_will_be_read_must_exist(saved, tmp_path):
    config = CheckpointConfig(initial_weights="no-such")
    check_given_paths(saved, config)
    with refused("[checkpoint] initial_weights = 'no-such'"):
        check_given_paths(tmp_path / "new", config)
    with refused("[checkpoint] resume = 'no-such'"):
        check_given_paths(saved, CheckpointConfig(resume="no-such"))


def test_initial_weights_without_effect_are_an_error():
    CheckpointConfig(initial_weights="dense", resume="auto")
    with pytest.raises(ValueError, match="initial_weights"):
        CheckpointConfig(initial_weights="dense", resume="runs/a")


# Other runs and formats.


def test_a_run_may_not_mix_its_checkpoints_with_others(saved, tmp_path):
    other = tmp_path / "other" / "step-000000001"
    shutil.copytree(saved / "step-000000001", other)
    for resume in ("never", str(other), str(saved / "step-000000002")):
        with refused(repr(resume), str(saved), "step-000000010"):
            find_checkpoint(saved, resume)
    assert find_checkpoint(tmp_path / "third", str(other)) == other
    for same in (saved / "step-000000010", saved, saved.parent):
        assert find_checkpoint(saved, str(same)) == saved / "step-000000010"


def test_equal_identities_pass_and_every_difference_is_named_with_both_values():
    check_same_run(
        {"model": {"size": "9m", "betas": [0.9, 0.99]}},
        {"model": {"betas": (0.9, 0.99), "size": "9m"}},
    )
    saved = {"model": {"size": "9m", "heads": 4}, "method": {"name": "switchlora", "rank": 3}}
    current = {"model": {"size": "20m", "heads": 4}, "method": {"name": "full_rank"}}
    with pytest.raises(CheckpointError) as raised:
        check_same_run(saved, current)
    message = str(raised.value)
    assert "model.size: saved with '9m', now '20m'" in message
    assert "method.rank: saved with 3, now" in message
    assert "heads" not in message


def as_format_4(checkpoint):
    """Such a checkpoint has no `SHA256SUMS`, and other keys."""
    (checkpoint / SUMS).unlink()
    file = checkpoint / "metadata.json"
    metadata = json.loads(file.read_text()) | {"format_version": 4, "files": {}}
    file.write_text(json.dumps(metadata))


def as_format_6(checkpoint):
    rewrite_metadata(checkpoint, lambda metadata: metadata.update(format_version=6, new_key=1))


@pytest.mark.parametrize("change", [as_format_4, as_format_6])
def test_a_checkpoint_of_another_format_is_refused_and_untouched(
    make_checkpointer, tensors, folder, change
):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 2)
    change(folder / "step-000000002")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    named = change.__name__.removeprefix("as_").replace("_", " ")
    for find in (str(folder / "step-000000002"), str(folder), "auto"):
        with refused(named, "reads format 5", error=CheckpointFormatError):
            find_checkpoint(folder, find)
    with refused(named):
        checkpointer.save(2, tensors, {})
    save_steps(checkpointer, tensors, 3)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.items() <= after.items()


# Those to delete.


@pytest.mark.parametrize(("keep_latest", "kept"), [(1, [10]), (2, [9, 10]), (0, [2, 9, 10])])
def test_only_the_newest_are_kept(make_checkpointer, tensors, folder, keep_latest, kept):
    save_steps(make_checkpointer(keep_latest=keep_latest), tensors, 2, 9, 10)
    assert names(folder) == [f"step-{step:09d}" for step in kept]


def damage_metadata(checkpoint):
    (checkpoint / "metadata.json").write_bytes(b"")


def add_a_file(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")


def give_to_another_run(checkpoint):
    rewrite_metadata(checkpoint, lambda metadata: metadata["identity"]["model"].update(size="7b"))


@pytest.mark.parametrize("change", [damage_metadata, add_a_file, give_to_another_run])
def test_what_is_not_this_run_s_checkpoint_alone_stays(make_checkpointer, tensors, folder, change):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    change(folder / "step-000000001")
    save_steps(checkpointer, tensors, 2, 3)
    assert names(folder) == ["step-000000001", "step-000000003"]


def test_newer_checkpoints_stay(make_checkpointer, tensors, folder):
    save_steps(make_checkpointer(keep_latest=1), tensors, 5, 4)
    assert names(folder) == ["step-000000004", "step-000000005"]


def test_an_interrupted_deletion_is_completed_but_for_other_files(
    make_checkpointer, tensors, folder, caplog
):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    half_deleted = (folder / "step-000000001").rename(folder / ".step-000000001.partial")
    (half_deleted / "metadata.json").unlink()
    add_a_file(half_deleted)
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == [half_deleted.name, "step-000000002"]
    assert half_deleted.name in caplog.text
    (half_deleted / "notes.txt").unlink()
    save_steps(checkpointer, tensors, 3)
    assert names(folder) == ["step-000000003"]
