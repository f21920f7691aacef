"""An exported folder is complete or absent; and the checksum of what a run starts from."""

import json

import pytest
import torch
from safetensors.torch import save_file
from support.folders import names_in

from switchtitan.errors import CheckpointError, OutputError
from switchtitan.hub.export_folder import new_folder
from switchtitan.hub.initial_weights import checksum
from switchtitan.hub.peft_folder import ADAPTER_CONFIG_NAME, ADAPTER_NAME, BASE_FOLDER


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_has_its_files_only_when_it_is_complete(tmp_path, exists):
    out = tmp_path / "a" / "out"
    if exists:
        out.mkdir(parents=True)
    with new_folder(out) as partial:
        (partial / "file").write_text("1")
        assert not out.exists() or names_in(out) == []
        refused = pytest.raises(OutputError, match=r"File exists: .*\.out\.partial.*other process")
        with refused, new_folder(out):
            pass
    assert names_in(tmp_path / "a") == ["out"]
    assert names_in(out) == ["file"]
    # It is kept.
    for given in (out, out / "file"):
        with pytest.raises(CheckpointError, match="not empty"), new_folder(given):
            pass
    assert (out / "file").read_text() == "1"


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "file").write_text("1")
        raise error
    with pytest.raises(OutputError, match="cannot be written"), new_folder(tmp_path / ("a" * 300)):
        pass
    assert names_in(tmp_path) == []


def test_a_checksum_covers_all_that_decides_the_weights(tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "adapter" / BASE_FOLDER
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    seen = set()
    for config, factor, weight in (
        (plain, 1.0, 1.0),
        ({**plain, "lora_alpha": 5}, 1.0, 1.0),
        ({**plain, "use_rslora": True}, 1.0, 1.0),
        (plain, 2.0, 1.0),
        (plain, 1.0, 2.0),
    ):
        (adapter / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
        name = "base_model.model.q_proj.lora_A.weight"
        save_file({name: torch.full((2,), factor)}, adapter / ADAPTER_NAME)
        save_file({"v": torch.ones(3)}, base / "model-00001-of-00002.safetensors")
        save_file({"w": torch.full((2,), weight)}, base / "model-00002-of-00002.safetensors")
        seen.add(checksum(adapter))
    assert len(seen) == 5
    before = checksum(base)
    (base / "README.md").write_text("a text")
    assert checksum(base) == before
