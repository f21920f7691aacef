import pytest
from support.checkpoints import rewrite_metadata

from switchtitan.checkpoint import Checkpointer, find_latest


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_steps(checkpointer: Checkpointer, tensors, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, tensors, {})


@pytest.mark.parametrize(
    ("keep_latest", "kept"),
    [
        (1, ["step-000000010"]),
        (2, ["step-000000009", "step-000000010"]),
        (0, ["step-000000002", "step-000000009", "step-000000010"]),
    ],
)
def test_only_the_newest_are_kept(make_checkpointer, tensors, folder, keep_latest, kept):
    save_steps(make_checkpointer(async_save=False, keep_latest=keep_latest), tensors, 2, 9, 10)
    assert names(folder) == kept


def test_damaged_checkpoint_is_neither_counted_nor_deleted(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(async_save=False, keep_latest=2)
    save_steps(checkpointer, tensors, 1, 2)
    (folder / "step-000000002" / "__0_0.distcp").write_bytes(b"")
    save_steps(checkpointer, tensors, 3)
    assert names(folder) == ["step-000000001", "step-000000002", "step-000000003"]


def test_an_interrupted_deletion_is_completed(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    half_deleted = (folder / "step-000000001").rename(folder / ".step-000000001.deleting")
    (half_deleted / "metadata.json").unlink()
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == ["step-000000002"]


def test_a_file_that_cannot_be_deleted_is_a_warning(make_checkpointer, tensors, folder, caplog):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    (folder / ".step-000000001.deleting").mkdir(parents=True)
    (folder / ".step-000000001.deleting" / "notes.txt").write_text("mine")
    save_steps(checkpointer, tensors, 2, 3)
    assert names(folder) == [".step-000000001.deleting", "step-000000003"]
    assert "could not delete what is left" in caplog.text


def test_folder_with_other_files_stays(make_checkpointer, tensors, folder, caplog):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    (folder / "step-000000001" / "notes.txt").write_text("mine")
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == ["step-000000001", "step-000000002"]
    assert "notes.txt" in caplog.text


def test_another_runs_checkpoint_stays(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    rewrite_metadata(
        folder / "step-000000001",
        lambda metadata: metadata["identity"]["model"].update(size="7b"),
    )
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == ["step-000000001", "step-000000002"]


def test_an_older_identity_is_compared_in_todays_keys(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(
        async_save=False,
        keep_latest=1,
        comparable_identity=lambda saved: {"model": {"size": "9m"}, **saved},
    )
    save_steps(checkpointer, tensors, 1)
    rewrite_metadata(folder / "step-000000001", lambda metadata: metadata["identity"].pop("model"))
    save_steps(checkpointer, tensors, 2)
    assert names(folder) == ["step-000000002"]


def test_the_last_complete_checkpoint_stays_until_a_newer_one_is_complete(
    make_checkpointer, tensors, folder
):
    save_steps(make_checkpointer(async_save=False, keep_latest=0), tensors, 1, 2, 3)
    for step in (2, 3):
        file = folder / f"step-00000000{step}" / "__0_0.distcp"
        file.write_bytes(bytes(file.stat().st_size))  # as long as before
    resumed = make_checkpointer(async_save=False, keep_latest=1, on_failure="continue")
    assert resumed.checkpoint_to_resume() == folder / "step-000000001"
    partial = folder / ".step-000000002.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    save_steps(resumed, tensors, 2)
    assert resumed.num_failed_saves == 1
    assert "step-000000001" in names(folder)
    (partial / "notes.txt").unlink()
    save_steps(resumed, tensors, 2)
    assert find_latest(folder) == folder / "step-000000002"
    assert "step-000000001" not in names(folder)


def test_newer_checkpoints_stay(make_checkpointer, tensors, folder):
    checkpointer = make_checkpointer(async_save=False, keep_latest=1)
    save_steps(checkpointer, tensors, 5, 4)
    assert names(folder) == ["step-000000004", "step-000000005"]
