import io
import json
import pickle
import zipfile
from typing import Any

import pytest
import torch
from support.checkpoints import read_tensors, rewrite_metadata

from switchtitan.checkpoint import find_latest, load_tensors_
from switchtitan.checkpoint.metadata import file_record
from switchtitan.checkpoint.verify import check_files
from switchtitan.errors import CheckpointError


@pytest.fixture
def saved(make_checkpointer, tensors):
    checkpointer = make_checkpointer(async_save=False)
    checkpointer.save(1, tensors, {})
    return checkpointer.latest


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace) -> None:
        self._trace = trace

    def __reduce__(self):
        return (open, (str(self._trace), "w"))


def update_file_records(path) -> None:
    """Updates sizes and checksums, as an attacker would."""

    def update(metadata: dict) -> None:
        for name in metadata["files"]:
            metadata["files"][name] = file_record(path / name).model_dump()

    rewrite_metadata(path, update)


def test_missing_unexpected_and_misshapen_tensors_are_named_before_anything_changes(saved, tensors):
    wanted = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    del wanted["optimizer.step"]
    wanted["model.new"] = torch.full((3,), 7.0)
    wanted["model.layers.0.weight"] = torch.full((7, 5), 7.0)
    wanted["model.norm.weight"] = torch.full((11,), 7.0)
    with pytest.raises(CheckpointError) as raised:
        load_tensors_(saved, wanted)
    message = str(raised.value)
    assert "lacks model.new" in message
    assert "holds optimizer.step" in message
    assert "model.layers.0.weight (float32 [5, 7], expected float32 [7, 5])" in message
    assert "model.norm.weight (bfloat16 [11], expected float32 [11])" in message
    assert all((tensor == 7).all() for tensor in wanted.values())


def test_many_missing_tensors_are_counted(saved, tensors):
    wanted = tensors | {f"model.new.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"model.new.3 and 5 more"):
        load_tensors_(saved, wanted)


def test_short_file_is_an_error_before_anything_changes(saved, tensors):
    data = saved / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    wanted = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has \d+ bytes, expected"):
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
    with pytest.raises(CheckpointError, match="no tensor whose name starts with 'nothing'"):
        read_tensors(saved, "nothing")


def test_malicious_index_pickle_is_never_opened(saved, tensors, tmp_path):
    (saved / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "executed")))
    update_file_records(saved)
    assert find_latest(saved.parent) == saved
    load_tensors_(saved, tensors)
    read_tensors(saved)
    assert not (tmp_path / "executed").exists()


def test_malicious_tensor_pickle_is_refused(saved, tensors, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(
            "archive/data.pkl", pickle.dumps(Malicious(tmp_path / "executed"), protocol=2)
        )
        file.writestr("archive/version", "3\n")
    index = json.loads((saved / "tensors.json").read_text())
    (saved / "__0_0.distcp").write_bytes(archive.getvalue())
    for tensor in index["tensors"].values():
        for piece in tensor["pieces"]:
            piece |= {"start": 0, "num_bytes": len(archive.getvalue())}
    (saved / "tensors.json").write_text(json.dumps(index))
    update_file_records(saved)
    check_files(saved)
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        load_tensors_(saved, tensors)
    assert not (tmp_path / "executed").exists()


def overlap(tensor: dict[str, Any]) -> None:
    """As many elements as the shape [5, 7] has, but row 1 twice and row 4 in no piece."""
    (piece,) = tensor["pieces"]
    tensor["pieces"] = [piece | {"sizes": [2, 7]}, piece | {"offsets": [1, 0], "sizes": [3, 7]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor["pieces"][0].update(file="../../secret"), "outside the files"),
        (lambda tensor: tensor["pieces"][0].update(start=10**9), "outside the files"),
        (lambda tensor: tensor["pieces"].clear(), "do not cover"),
        (lambda tensor: tensor.update(shape=[5, 8]), "do not cover"),
        (lambda tensor: tensor["pieces"][0].update(offsets=[1, 0]), "do not cover"),
        (lambda tensor: tensor["pieces"].append(dict(tensor["pieces"][0])), "do not cover"),
        (overlap, "do not cover its shape .* exactly once"),
    ],
)
def test_index_that_does_not_fit_is_refused(saved, tensors, change, message):
    index = json.loads((saved / "tensors.json").read_text())
    change(index["tensors"]["model.layers.0.weight"])
    (saved / "tensors.json").write_text(json.dumps(index))
    update_file_records(saved)
    with pytest.raises(CheckpointError, match=message):
        load_tensors_(saved, tensors)


def test_unknown_dtype_is_refused(saved):
    index = (saved / "tensors.json").read_text()
    (saved / "tensors.json").write_text(index.replace('"int64"', '"load"'))
    update_file_records(saved)
    with pytest.raises(CheckpointError, match="dtype 'load'"):
        read_tensors(saved)


def test_file_names_may_not_leave_the_folder(saved):
    rewrite_metadata(
        saved,
        lambda metadata: metadata["files"].update({"../secret": metadata["files"]["tensors.json"]}),
    )
    with pytest.raises(CheckpointError, match="not a plain file name"):
        read_tensors(saved)
