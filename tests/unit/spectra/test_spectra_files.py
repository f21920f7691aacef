from pathlib import Path

import pytest
import torch

from switchtitan.errors import CheckpointError
from switchtitan.spectra.spectra_files import drop_spectra_after, read_spectra, write_spectra


def test_measurements_are_read_by_step_in_order(tmp_path: Path) -> None:
    for step in (20, 3):
        write_spectra(
            tmp_path / "spectra",
            step,
            {"a": torch.tensor([2.0, 1.0]), "b": torch.tensor([step / 1])},
        )
    write_spectra(tmp_path / "spectra", 3, {"a": torch.tensor([4.0])})
    measured = read_spectra(tmp_path / "spectra")
    assert list(measured) == [3, 20]
    assert measured[3]["a"].tolist() == [4.0]
    assert measured[20]["b"].tolist() == [20.0]
    assert len(list((tmp_path / "spectra").iterdir())) == 2


def test_a_missing_folder_has_no_measurements(tmp_path: Path) -> None:
    assert read_spectra(tmp_path / "spectra") == {}
    drop_spectra_after(tmp_path / "spectra", 0)
    assert list(tmp_path.iterdir()) == []


def test_only_later_measurements_are_dropped(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_spectra(tmp_path, step, {"a": torch.ones(1)})
    (tmp_path / "notes.txt").write_text("mine")
    drop_spectra_after(tmp_path, 10)
    assert list(read_spectra(tmp_path)) == [10]
    assert (tmp_path / "notes.txt").exists()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = write_spectra(tmp_path, 10, {"a": torch.ones(9)})
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        CheckpointError, match=r"step-000000010.safetensors is damaged .*; delete it"
    ):
        read_spectra(tmp_path)
