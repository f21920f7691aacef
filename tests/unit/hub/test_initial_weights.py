"""The fingerprint of what a run starts from."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from switchtitan.hub.initial_weights import fingerprint
from switchtitan.hub.peft_config import ADAPTER_CONFIG_NAME
from switchtitan.hub.peft_folder import ADAPTER_NAME, BASE_FOLDER

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
FACTOR = "base_model.model.q_proj.lora_A.weight"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder of two weights files."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for number in (1, 2):
        file = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({f"weight_{number}": torch.full((number,), 3.0)}, file)
    return folder


def make_adapter(plain: Path) -> Path:
    folder = plain.with_name("adapter")
    folder.mkdir()
    (folder / BASE_FOLDER).symlink_to(plain)
    save_file({FACTOR: torch.ones(2)}, folder / ADAPTER_NAME)
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps(CONFIG))
    return folder


def test_a_plain_folder_has_the_fingerprint_of_its_weights_files(plain: Path) -> None:
    digests = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(plain.glob("*.safetensors"))
    ]
    expected = hashlib.sha256("".join(digests).encode()).hexdigest()
    assert fingerprint(plain) == expected
    (plain / "README.md").write_text("another text")
    assert fingerprint(plain) == expected


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 5}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}]
)
def test_an_adapters_fingerprint_covers_its_scale(plain: Path, changes: dict[str, object]) -> None:
    folder = make_adapter(plain)
    before = fingerprint(folder)
    assert before == fingerprint(folder)
    (folder / ADAPTER_CONFIG_NAME).write_text(json.dumps({**CONFIG, **changes}))
    assert fingerprint(folder) != before


@pytest.mark.parametrize("name", [ADAPTER_NAME, "base/model-00001-of-00002.safetensors"])
def test_an_adapters_fingerprint_covers_factors_and_base(plain: Path, name: str) -> None:
    folder = make_adapter(plain)
    before = fingerprint(folder)
    save_file({FACTOR: torch.full((2,), 7.0)}, folder / name)
    assert fingerprint(folder) != before
