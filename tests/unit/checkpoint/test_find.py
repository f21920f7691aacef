import logging
import shutil

import pytest

from switchtitan.checkpoint import check_output_folder, find_checkpoint, find_given, find_latest
from switchtitan.checkpoint.layout import FORMAT_VERSION
from switchtitan.errors import CheckpointError


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
    with caplog.at_level(logging.INFO):
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


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_other_format_version_is_an_error(saved, version):
    """A checkpoint of format 1 holds B transposed: it is refused even if all shapes match."""
    metadata = saved / "step-000000002" / "metadata.json"
    own = f'"format_version": {FORMAT_VERSION}'
    assert own in metadata.read_text()
    metadata.write_text(metadata.read_text().replace(own, f'"format_version": {version}'))
    with pytest.raises(
        CheckpointError,
        match=rf"checkpoint format {version}, .* reads format {FORMAT_VERSION}; resume or export it",
    ):
        find_given(saved / "step-000000002")


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
