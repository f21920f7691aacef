"""Checkpoints from before a key existed are of the same run as long as the key has its default."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_trainer

from switchtitan.checkpoint import check_same_run
from switchtitan.config.errors import CheckpointError
from switchtitan.config.toml_text import resolved_toml
from switchtitan.distributed.world import stop_world
from switchtitan.run_description import changed_keys, completed_identity

NEW_KEYS = ("candidates", "reset_moments")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def identity(folder: Path, method: str, *overrides: str) -> dict[str, dict]:
    config = tiny_config(folder, method, *overrides)
    return {
        "model": config.model.model_dump(mode="json"),
        "method": config.method.model_dump(mode="json"),
        "job": {"seed": 42},
    }


def without(section: dict, *keys: str) -> dict:
    return {key: value for key, value in section.items() if key not in keys}


# With a decay that is constant, the saved default of decay_ratio is a value that nobody may give.
@pytest.mark.parametrize("decay", ["constant", "exponential"])
def test_an_identity_from_before_its_keys_existed_is_the_same(tmp_path: Path, decay: str):
    now = identity(tmp_path, "switchlora", "--method.decay", decay)
    old = now | {"method": without(now["method"], *NEW_KEYS), "model": without(now["model"], "rope_theta")}
    with pytest.raises(CheckpointError):
        check_same_run(old, now)
    check_same_run(completed_identity(old), now)
    assert not any(key in old["method"] for key in NEW_KEYS), "changed in place"


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [("candidates", "constant", "swap"), ("reset_moments", "both", "counterpart")],
)
def test_what_a_new_key_changes_is_refused(tmp_path: Path, key: str, value: str, default: str):
    now = identity(tmp_path, "switchlora", f"--method.{key}", value)
    old = now | {"method": without(now["method"], *NEW_KEYS)}
    with pytest.raises(CheckpointError, match=f"method.{key}: saved with '{default}', now '{value}'"):
        check_same_run(completed_identity(old), now)


def test_a_key_that_no_longer_exists_and_an_unknown_method_are_refused(tmp_path: Path):
    now = identity(tmp_path, "lora")
    old = now | {"method": now["method"] | {"gain": 2.0}}
    with pytest.raises(CheckpointError, match=r"method.gain: saved with 2.0, now '\(absent\)'"):
        check_same_run(completed_identity(old), now)
    unknown = now | {"method": {"name": "dora", "rank": 6}}
    assert completed_identity(unknown) == unknown
    with pytest.raises(CheckpointError, match=r"method.name: saved with 'dora', now 'lora'"):
        check_same_run(completed_identity(unknown), now)


def test_a_missing_key_without_a_default_is_refused(tmp_path: Path):
    now = identity(tmp_path, "lora")
    old = now | {"method": without(now["method"], "rank")}
    with pytest.raises(CheckpointError, match=r"method.rank: saved with '\(absent\)', now 6"):
        check_same_run(completed_identity(old), now)


def test_a_run_goes_on_from_a_checkpoint_from_before_its_keys_existed(corpora: Path):
    folder = corpora / "older"
    short = ("--evaluation.interval", "100", "--checkpoint.interval", "2")
    tiny_trainer(folder, "switchlora", *short, "--training.steps", "2").train()
    file = folder / "run" / "checkpoints" / "step-000000002" / "metadata.json"
    metadata = json.loads(file.read_text())
    metadata["identity"]["method"] = without(metadata["identity"]["method"], *NEW_KEYS)
    file.write_text(json.dumps(metadata))
    resumed = tiny_trainer(folder, "switchlora", *short, "--training.steps", "3")
    assert resumed.state.step == 2
    resumed.batches.close()


def test_keys_that_changed_since_a_checkpoint_are_told(tmp_path: Path):
    before = tiny_config(tmp_path, "lora")
    now = tiny_config(
        tmp_path, "lora", "--optimizer.lr", "5e-3", "--training.steps", "50", "--job.name", "other"
    )
    assert changed_keys(resolved_toml(before), now) == [
        "optimizer.lr: 0.01 -> 0.005",
        "training.steps: 40 -> 50",
    ]
    assert changed_keys(resolved_toml(before), before) == []


def test_a_resumed_run_warns_of_changed_keys_and_one_that_trains_nothing_keeps_no_configuration(
    corpora, caplog
):
    folder = corpora / "changed-keys"
    tiny_trainer(folder, "lora", "--training.steps", "20").train()
    stop_world()
    with caplog.at_level("WARNING"):
        tiny_trainer(folder, "lora", "--training.steps", "20", "--optimizer.lr", "0.09").train()
    assert "changed since that checkpoint: optimizer.lr: 0.01 -> 0.09" in caplog.text
    assert not list((folder / "run").glob("config-from-step-*"))
