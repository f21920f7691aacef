"""What is read of a run's folder, and what is noted as missing or damaged."""

import json
from pathlib import Path

import pytest
import torch
from support.reported import NUM_STEPS, results, write_curves, write_run

from switchtitan.errors import ConfigError
from switchtitan.observability import TENSORBOARD_FOLDER
from switchtitan.report.run_files import broken_event_files, read_run
from switchtitan.spectra.spectra_files import SPECTRA_FOLDER, write_spectra


def event_file(run: Path) -> Path:
    (file,) = (run / TENSORBOARD_FOLDER).glob("*tfevents*")
    return file


def test_a_finished_run_is_read_without_notes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, final=3.0))
    assert run.notes == ()
    assert run.curves["loss/train"][0] == list(range(1, NUM_STEPS + 1))
    assert run.results is not None
    assert run.results.validation_loss == results(3.0)["loss/validation"]
    assert run.results.num_parameters is not None
    assert run.results.num_parameters.trainable == 1_370_000
    assert run.config["method.rank"] == "8"


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[method]\nname = 'lora'")
    run = read_run(tmp_path)
    assert "no step was reported yet" in run.notes[0]
    assert "the run is not finished" in run.notes[1]
    assert run.config == {"method.name": '"lora"'}


def test_a_folder_of_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run or of a comparison"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "file")


def test_a_truncated_event_file_gives_the_points_before_and_a_note(tmp_path: Path) -> None:
    file = event_file(write_run(tmp_path))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    run = read_run(tmp_path)
    assert run.notes == (f"{file.name} ends within a record: points after it are missing",)
    assert 0 < len(run.curves["loss/train"][0]) < NUM_STEPS


def test_any_incomplete_event_file_is_found_and_no_complete_one(tmp_path: Path) -> None:
    write_curves(tmp_path, final=3.0, num_steps=1)
    file = event_file(tmp_path)
    data = file.read_bytes()
    ends, end = {0}, 0
    while end < len(data):
        end += 16 + int.from_bytes(data[end : end + 8], "little")
        ends.add(end)
    for size in range(len(data) + 1):
        file.write_bytes(data[:size])
        assert bool(broken_event_files(file.parent)) == (size not in ends), size
    file.write_bytes(data + bytes(4096))
    assert broken_event_files(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("name", "damaged", "note"),
    [
        ("results.json", "{", "results.json cannot be read: Invalid JSON"),
        ("results.json", "[]", "results.json cannot be read: Input should be an object"),
        ("results.json", '{"step": "x"}', "results.json cannot be read: Input should be a valid"),
        ("results.json", "\x00", "results.json cannot be read"),
        ("config.toml", "[", "config.toml cannot be read"),
        ("tensorboard/profile_summary.json", "{}", "profile_summary.json cannot be read"),
        ("spectra/step-000000001.safetensors", "x", "spectra cannot be read"),
    ],
)
def test_a_damaged_file_is_noted_and_the_others_are_read(
    tmp_path: Path, name: str, damaged: str, note: str
) -> None:
    file = write_run(tmp_path) / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(damaged)
    run = read_run(tmp_path)
    assert note in " ".join(run.notes)
    assert len(run.notes) == 1
    assert len(run.curves["loss/train"][0]) == NUM_STEPS


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (write_run(tmp_path) / "results.json").open("ab") as stream:
        stream.truncate(1 << 30)
    assert "expected at most" in " ".join(read_run(tmp_path).notes)


def test_the_configuration_of_the_last_resumption_counts(tmp_path: Path) -> None:
    write_run(tmp_path)
    for step in (9, 10):
        (tmp_path / f"config-from-step-{step}.toml").write_text(f"[optimizer]\nlr = {step}.0")
    run = read_run(tmp_path)
    assert run.config == {"optimizer.lr": "10.0"}
    assert run.notes == ("the configuration is that from step 10 on (config-from-step-10.toml)",)


def test_tensors_that_are_no_spectra_are_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path) / SPECTRA_FOLDER
    write_spectra(folder, 5, {"a.q_proj": torch.tensor([2.0, 1.0])})
    for step, tensor in enumerate(
        [torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, torch.nan])]
    ):
        write_spectra(folder, 10 + step, {"a.q_proj": tensor})
    run = read_run(tmp_path)
    assert list(run.spectra) == [5]
    assert run.notes == ("3 files in spectra/ hold no spectra",)


def test_unknown_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results(3.0) | {"later": [1]}))
    assert read_run(tmp_path).notes == ()


def test_results_before_the_run_continued_are_not_its_results(tmp_path: Path) -> None:
    """As after `[training] steps` was increased and the resumed run was killed."""
    write_run(tmp_path, final=3.0)
    early = results(4.0) | {"step": NUM_STEPS - 2}
    (tmp_path / "results.json").write_text(json.dumps(early))
    run = read_run(tmp_path)
    assert run.results is None
    (note,) = run.notes
    assert note.startswith(f"results.json is of step {NUM_STEPS - 2}, after which the run")
    # The step at which a run diverges is reported, and does not count.
    diverged = early | {"step": NUM_STEPS - 1, "diverged": True}
    (tmp_path / "results.json").write_text(json.dumps(diverged))
    assert read_run(tmp_path).results is not None
