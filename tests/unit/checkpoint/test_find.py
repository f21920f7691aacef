"""The checkpoint to resume from, those of other runs and formats, and those to delete."""

import random
import shutil
import subprocess

import pytest
from support.checkpoints import SUMS, refused, rewrite_metadata
from support.folders import contents, names_in

from switchtitan.checkpoint.config import CheckpointConfig
from switchtitan.checkpoint.load import (
    check_same_run,
    find_checkpoint,
    find_given,
    find_latest,
    verify,
)
from switchtitan.errors import CheckpointFormatError

FILES = ("metadata.json", SUMS, "__0_0.distcp", ".metadata")
AUTO = CheckpointConfig()


def save_steps(checkpointer, tensors, *steps):
    for step in steps:
        checkpointer.save(step, tensors, {})


def test_resume_finds_the_newest_checkpoint_or_none(saved, tmp_path):
    (saved / ".step-000000099.partial").mkdir()
    (saved / "step-000000099").write_text("a file")
    (saved / "step-final").mkdir()
    assert find_checkpoint(saved, AUTO) == saved / "step-000000010"
    for resume in ("auto", "never"):
        assert find_checkpoint(tmp_path / "nowhere", CheckpointConfig(resume=resume)) is None


def test_damaged_checkpoints_are_skipped_and_alone_do_not_start_a_new_run(saved, caplog):
    (saved / "step-000000010" / "metadata.json").unlink()
    assert find_checkpoint(saved, AUTO).name == "step-000000002"
    assert "step-000000010: FileNotFoundError" in caplog.text
    for path in saved.iterdir():
        (path / ".metadata").unlink()
    with refused("resume = 'auto'", str(saved)):
        find_checkpoint(saved, AUTO)


def test_a_path_can_be_a_checkpoint_a_folder_or_a_run(saved):
    assert find_given(saved / "step-000000002").name == "step-000000002"
    assert find_given(saved).name == find_given(saved.parent).name == "step-000000010"
    (saved / "step-000000002" / ".metadata").write_bytes(b"")
    for path, parts in (("nowhere", ["nowhere"]), ("step-000000002", [".metadata", "checksum"])):
        with refused(*parts):
            find_given(saved / path)


def test_sha256sum_checks_all_other_files(saved):
    newest = saved / "step-000000010"
    check = ["sha256sum", "--strict", "-c", SUMS]
    said = subprocess.run(check, cwd=newest, capture_output=True, text=True, check=True).stdout
    assert said == "".join(f"{name}: OK\n" for name in sorted({*FILES} - {SUMS}))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_detected_and_the_checkpoint_before_is_found(saved, name):
    """Also one flipped bit, of which 150 are tried, and the file of another checkpoint."""
    file = saved / "step-000000010" / name
    before = file.read_bytes()
    damages = [before[:-1], b"", before + b"\0", bytes(len(before))]
    damages.append(b"".join(before.splitlines(keepends=True)[:-1]))
    damages.append((saved / "step-000000001" / name).read_bytes())
    bits = range(8 * len(before))
    for bit in random.Random(0).sample(bits, min(150, len(bits))):
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        damages.append(changed)
    for damage in damages:
        file.write_bytes(damage)
        with refused(str(file.parent)):
            verify(file.parent)
    assert find_latest(saved).name == "step-000000002"
    file.write_bytes(before)
    assert verify(file.parent).step == 10


def test_a_file_of_tensors_without_a_checksum_is_refused(saved):
    sums = saved / "step-000000010" / SUMS
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if not line.endswith(".distcp\n")))
    with refused("SHA256SUMS lacks __0_0.distcp"):
        verify(sums.parent)


def test_an_error_of_the_disk_is_not_an_empty_folder_and_fails_no_save(
    make_checkpointer, tensors, saved, monkeypatch, caplog
):
    def fail(path):
        raise OSError(116, "Stale file handle", str(path))

    checkpointer = make_checkpointer()
    monkeypatch.setattr(type(saved), "iterdir", fail)
    with refused("Stale file handle"):
        find_latest(saved)
    checkpointer.save(11, tensors, {})
    assert checkpointer.latest == saved / "step-000000011"
    assert "could not delete older checkpoints" in caplog.text


def test_a_run_may_not_mix_its_checkpoints_with_others(saved, tmp_path):
    other = shutil.copytree(saved / "step-000000001", tmp_path / "other" / "step-000000001")
    for resume in ("never", str(other), str(saved / "step-000000002")):
        with refused(repr(resume), str(saved), "step-000000010"):
            find_checkpoint(saved, CheckpointConfig(resume=resume))
    with refused("no complete checkpoint"):
        find_checkpoint(saved, CheckpointConfig(resume=str(tmp_path / "nowhere")))
    given = CheckpointConfig(resume=str(other))
    assert find_checkpoint(tmp_path / "third", given) == other
    for same in (saved / "step-000000010", saved, saved.parent):
        found = find_checkpoint(saved, CheckpointConfig(resume=str(same)))
        assert found == saved / "step-000000010"


def test_equal_identities_pass_and_every_difference_is_named_with_both_values():
    check_same_run({"model": {"size": "9m", "a": [0.9]}}, {"model": {"a": (0.9,), "size": "9m"}})
    saved = {"model": {"size": "9m", "heads": 4}, "method": {"rank": 3}}
    current = {"model": {"size": "20m", "heads": 4}, "method": {"rank": 5}}
    parts = ("model.size: saved with '9m', now '20m'", "method.rank: saved with 3, now")
    with refused(*parts) as raised:
        check_same_run(saved, current)
    assert "heads" not in str(raised.value)
    with refused("method.name: saved with 'lora', now 'galore'") as raised:
        check_same_run(
            {"method": {"name": "lora", "rank": 3}}, {"method": {"name": "galore", "scale": 2}}
        )
    assert "rank" not in str(raised.value)
    assert "scale" not in str(raised.value)


@pytest.mark.parametrize("number", [4, 7])
def test_a_checkpoint_of_another_format_is_refused_and_untouched(
    make_checkpointer, tensors, folder, number
):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 2)
    other = folder / "step-000000002"
    rewrite_metadata(other, lambda metadata: metadata.update(format_version=number, new_key=1))
    if number == 4:
        (other / SUMS).unlink()  # which it does not have
    before = contents(folder)
    for resume in (str(other), str(folder), "auto"):
        with refused(f"format {number}", "reads format 6", error=CheckpointFormatError):
            find_checkpoint(folder, CheckpointConfig(resume=resume))
    save_steps(checkpointer, tensors, 3)
    assert before.items() <= contents(folder).items()


@pytest.mark.parametrize(
    ("latest", "every", "kept"),
    [(1, None, [10]), (2, None, [9, 10]), (0, None, [2, 3, 9, 10]), (1, 3, [3, 9, 10])],
)
def test_the_newest_are_kept_and_every_nth(make_checkpointer, tensors, folder, latest, every, kept):
    checkpointer = make_checkpointer(keep_latest=latest, keep_every=every)
    save_steps(checkpointer, tensors, 2, 3)
    # What an interrupted deletion leaves.
    (folder / ".step-000000001.partial").mkdir()
    save_steps(checkpointer, tensors, 9, 10)
    assert names_in(folder) == [f"step-{step:09d}" for step in kept]


def test_what_is_not_an_older_checkpoint_of_this_run_alone_stays(
    make_checkpointer, tensors, folder
):
    checkpointer = make_checkpointer(keep_latest=1)
    save_steps(checkpointer, tensors, 1)
    first = folder / "step-000000001"
    newer, other, damaged = (shutil.copytree(first, folder / f"step-{n:09d}") for n in (99, 3, 2))
    rewrite_metadata(newer, lambda metadata: metadata.update(step=99))
    rewrite_metadata(other, lambda metadata: metadata["identity"]["model"].update(size="7b"))
    (damaged / "metadata.json").write_bytes(b"")
    (first / "notes.txt").write_text("mine")
    before = contents(folder)
    save_steps(checkpointer, tensors, 4, 5)
    assert before.items() <= contents(folder).items()
    assert names_in(folder) == [f"step-{step:09d}" for step in (1, 2, 3, 5, 99)]


def test_a_damaged_newer_checkpoint_does_not_count_as_kept(make_checkpointer, tensors, folder):
    save_steps(make_checkpointer(keep_latest=0), tensors, 1, 2)
    (folder / "step-000000002" / "__0_0.distcp").write_bytes(b"")
    resumed = make_checkpointer(latest=find_latest(folder), keep_latest=2)
    save_steps(resumed, tensors, 3)
    # Two that can be resumed from, and the damaged one.
    assert names_in(folder) == [f"step-00000000{step}" for step in (1, 2, 3)]
    save_steps(resumed, tensors, 4)
    assert names_in(folder) == [f"step-00000000{step}" for step in (2, 3, 4)]
