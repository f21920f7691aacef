"""The checkpoint to resume from, those of other runs and formats, and those to delete."""

import logging
import shutil

import pytest
import torch
from support.checkpoints import refused, rewrite_metadata

from switchtitan.checkpoint import (
    CheckpointConfig,
    check_output_folder,
    check_same_run,
    find_all,
    find_checkpoint,
    find_given,
    find_latest,
)
from switchtitan.checkpoint.disk_space import estimate_bytes, num_additional_checkpoints
from switchtitan.checkpoint.metadata import FORMAT_VERSION
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


def test_resume_finds_the_newest_checkpoint_or_none(make_checkpointer, saved, tmp_path, caplog):
    assert find_latest(tmp_path / "nowhere") is None
    assert find_checkpoint(tmp_path / "nowhere", "auto") is None
    with caplog.at_level(logging.INFO, logger="switchtitan.checkpoint.find"):
        assert find_latest(saved) == saved / "step-000000010"
    assert "step-000000010" in caplog.text
    assert make_checkpointer().checkpoint_to_resume() == saved / "step-000000010"
    with refused("resume = 'never'", "step-000000010"):
        make_checkpointer(resume="never").checkpoint_to_resume()


def test_partial_and_foreign_folders_are_no_checkpoints(saved):
    (saved / ".step-000000099.partial").mkdir()
    (saved / "step-000000099").write_text("a file")
    (saved / "step-final").mkdir()
    assert find_latest(saved).name == "step-000000010"


def test_damaged_checkpoints_are_skipped_and_alone_do_not_start_a_new_run(saved, caplog):
    (saved / "step-000000010" / "metadata.json").unlink()
    assert find_latest(saved).name == "step-000000002"
    assert "step-000000010" in caplog.text
    for path in saved.iterdir():
        (path / "tensors.json").unlink()
    with refused("resume = 'auto'", str(saved)):
        find_checkpoint(saved, "auto")


def test_a_path_can_be_a_checkpoint_a_folder_or_a_run(saved):
    assert find_given(saved / "step-000000002").name == "step-000000002"
    assert find_given(saved).name == "step-000000010"
    assert find_given(saved.parent).name == "step-000000010"
    with refused("nowhere"):
        find_given(saved / "nowhere")
    (saved / "step-000000002" / "tensors.json").write_text("{}")
    with refused("tensors.json", "2 bytes"):
        find_given(saved / "step-000000002")


def test_all_complete_checkpoints_are_found_oldest_first(saved, tmp_path):
    expected = [saved / f"step-{step:09d}" for step in (1, 2, 10)]
    assert find_all(saved) == expected
    assert find_all(expected[1]) == [expected[1]]
    (expected[1] / "__0_0.distcp").unlink()
    assert find_all(saved) == [expected[0], expected[2]]
    with refused(str(tmp_path / "nowhere")):
        find_all(tmp_path / "nowhere")


def test_initial_weights_without_effect_are_an_error():
    CheckpointConfig(initial_weights="dense", resume="auto")
    with pytest.raises(ValueError, match="initial_weights"):
        CheckpointConfig(initial_weights="dense", resume="runs/a")


# Other runs and formats.


@pytest.mark.parametrize("resume", ["auto", "never", "elsewhere"])
def test_an_empty_or_missing_folder_is_accepted(folder, resume):
    check_output_folder(folder, resume)
    folder.mkdir(parents=True)
    check_output_folder(folder, resume)


def test_a_run_may_not_mix_its_checkpoints_with_others(saved, tmp_path):
    other = tmp_path / "other" / "step-000000001"
    shutil.copytree(saved / "step-000000001", other)
    for resume, named in {
        "never": "step-000000010",
        str(other): str(saved),
        str(saved / "step-000000002"): "step-000000010",
    }.items():
        with refused(repr(resume), named):
            check_output_folder(saved, resume)
    check_output_folder(tmp_path / "third", str(other))
    for same in (saved / "step-000000010", saved, saved.parent):
        check_output_folder(saved, str(same))


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


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_a_checkpoint_of_another_format_is_refused_and_untouched(
    make_checkpointer, tensors, folder, version
):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 2)
    rewrite_metadata(
        folder / "step-000000002", lambda metadata: metadata.update(format_version=version)
    )
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for find in (str(folder / "step-000000002"), str(folder), "auto"):
        with refused(f"format {version}", error=CheckpointFormatError):
            find_checkpoint(folder, find)
    with refused(f"format {version}"):
        checkpointer.save(2, tensors, {})
    save_steps(checkpointer, tensors, 3)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert before.items() <= after.items()


# Those to delete.


@pytest.mark.parametrize(("keep_latest", "kept"), [(1, [10]), (2, [9, 10]), (0, [2, 9, 10])])
def test_only_the_newest_are_kept(make_checkpointer, tensors, folder, keep_latest, kept):
    save_steps(make_checkpointer(keep_latest=keep_latest), tensors, 2, 9, 10)
    assert names(folder) == [f"step-{step:09d}" for step in kept]


def empty_tensors(checkpoint):
    (checkpoint / "__0_0.distcp").write_bytes(b"")


def add_a_file(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")


def give_to_another_run(checkpoint):
    rewrite_metadata(checkpoint, lambda metadata: metadata["identity"]["model"].update(size="7b"))


@pytest.mark.parametrize("change", [empty_tensors, add_a_file, give_to_another_run])
def test_what_is_not_a_complete_checkpoint_of_this_run_stays(
    make_checkpointer, tensors, folder, change
):
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
    half_deleted = (folder / "step-000000001").rename(folder / ".step-000000001.deleting")
    (half_deleted / "metadata.json").unlink()
    add_a_file(half_deleted)
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == [half_deleted.name, "step-000000002"]
    assert half_deleted.name in caplog.text
    (half_deleted / "notes.txt").unlink()
    save_steps(checkpointer, tensors, 3)
    assert names(folder) == ["step-000000003"]


def test_an_older_identity_is_compared_in_todays_keys(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(
        keep_latest=1, comparable_identity=lambda saved: {"model": {"size": "9m"}, **saved}
    )
    save_steps(checkpointer, tensors, 1)
    rewrite_metadata(folder / "step-000000001", lambda metadata: metadata["identity"].pop("model"))
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == ["step-000000002"]


def test_the_last_complete_checkpoint_stays_until_a_newer_one_is_complete(
    make_checkpointer, tensors, folder
):
    save_steps(make_checkpointer(keep_latest=0), tensors, 1, 2, 3)
    for step in (2, 3):
        file = folder / f"step-00000000{step}" / "__0_0.distcp"
        file.write_bytes(bytes(file.stat().st_size))  # as long as before
    resumed = make_checkpointer(keep_latest=1, on_failure="continue")
    assert resumed.checkpoint_to_resume() == folder / "step-000000001"
    partial = folder / ".step-000000002.partial"
    partial.mkdir()
    add_a_file(partial)
    save_steps(resumed, tensors, 2)
    assert resumed.num_failed_saves == 1
    assert "step-000000001" in names(folder)
    (partial / "notes.txt").unlink()
    save_steps(resumed, tensors, 2)
    assert find_latest(folder) == folder / "step-000000002"
    assert "step-000000001" not in names(folder)


# The room that the next ones take.


def most_at_once(num_present, num_saves, keep_latest):
    """Saves and prunes one by one."""
    present = most = num_present
    for _ in range(num_saves):
        present += 1
        most = max(most, present)
        if keep_latest:
            present = min(present, keep_latest)
    return most


def test_the_number_of_checkpoints_at_once_is_that_of_saving_and_pruning():
    for num_present in (0, 1, 2, 7):
        for num_saves in (1, 2, 3, 10):
            for keep_latest in (0, 1, 2, 5):
                case = (num_present, num_saves, keep_latest)
                assert num_additional_checkpoints(*case) == most_at_once(*case) - num_present, case


def test_the_estimate_is_a_little_more_than_a_checkpoint_takes(make_checkpointer, tensors):
    checkpointer = make_checkpointer()
    tensors |= {f"more.{i}.weight": torch.ones(100, 1 + i) for i in range(100)}
    checkpointer.save(1, tensors, {})
    on_disk = sum(file.stat().st_size for file in checkpointer.latest.iterdir())
    assert on_disk < estimate_bytes(tensors.values(), num_ranks=1) < 1.5 * on_disk
