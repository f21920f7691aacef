"""Damaged checkpoints are refused by name, or are valid."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.checkpoints import update_checksum, update_file_records
from support.fuzzing import FuzzError, fuzz, num_cases
from support.mutations import mutate_bytes, mutate_json
from support.tiny import tiny_config, tiny_trainer

from switchtitan.builders.saved_config import saved_config
from switchtitan.builders.start import read_state
from switchtitan.builders.trained_corpus import find_corpus, trained_corpus
from switchtitan.checkpoint import find_given, load_tensors_, read_metadata, verify
from switchtitan.hub.dense_checkpoint import saved_model_config
from switchtitan.hub.initial_weights import read_initial_weights

FILES = ("metadata.json", "tensors.json", "metadata.json.sha256", "__0_0.distcp", ".metadata")


@pytest.fixture(scope="module")
def saved(corpora: Path) -> Path:
    trainer = tiny_trainer(corpora / "fuzzed", "switchlora")
    state = asdict(trainer.stepper.state)
    trainer.checkpointer.save(0, trainer.tensors(), state)
    trainer.stepper.close()
    assert trainer.checkpointer.latest is not None
    return trainer.checkpointer.latest


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


@pytest.fixture
def use(checkpoint: Path, corpora: Path) -> Callable[[], None]:
    """Reads everything that resuming, a warm start, an evaluation and an export read."""
    config = tiny_config(corpora / "fuzzed", "full_rank")
    valid = read_metadata(checkpoint)
    tensors = {
        name: torch.zeros(record.shape, dtype=getattr(torch, record.dtype))
        for name, record in verify.read_tensors_index(checkpoint).tensors.items()
    }
    identity, resolved = dict(valid.identity), str(valid.run["config"])

    def use() -> None:
        find_given(checkpoint)
        read_state(checkpoint, identity, resolved)
        load_tensors_(checkpoint, tensors)
        read_initial_weights(checkpoint, config.model)
        metadata = read_metadata(checkpoint)
        saved_model_config(checkpoint)
        saved_config(metadata)
        trained_corpus(find_corpus(metadata), metadata)

    return use


def restore(saved: Path, checkpoint: Path) -> None:
    for name in FILES:
        if (checkpoint / name).read_bytes() != (saved / name).read_bytes():
            shutil.copyfile(saved / name, checkpoint / name)


def test_the_checkpoint_is_valid_without_damage(use: Callable[[], None]) -> None:
    use()


def damage_manifest(saved: Path, checkpoint: Path, name: str) -> Callable[[random.Random], str]:
    """Changes values of a manifest, with sizes and checksums that fit, as an attacker would."""

    def damage(draw: random.Random) -> str:
        restore(saved, checkpoint)
        file = checkpoint / name
        if draw.random() < 0.1:
            text = mutate_bytes(file.read_bytes(), draw).decode(errors="replace")
        else:
            text = mutate_json(json.loads(file.read_text()), draw)
        file.write_text(text)
        if name == "metadata.json":
            update_checksum(checkpoint)
        else:
            update_file_records(checkpoint)
        return text[:2000]

    return damage


@pytest.mark.parametrize("name", ["metadata.json", "tensors.json"])
@pytest.mark.parametrize("part", range(4))
def test_a_damaged_manifest(
    saved: Path,
    checkpoint: Path,
    use: Callable[[], None],
    name: str,
    part: int,
    bounded_memory: None,
) -> None:
    number = num_cases(2500, 15)
    cases = range(part * number, (part + 1) * number)
    damage = damage_manifest(saved, checkpoint, name)
    fuzz(f"checkpoint: {name}", damage, use, cases, min_refused=0.2)


def test_damaged_tensors(
    saved: Path, checkpoint: Path, use: Callable[[], None], bounded_memory: None
) -> None:
    def damage(draw: random.Random) -> str:
        restore(saved, checkpoint)
        file = checkpoint / "__0_0.distcp"
        data = file.read_bytes()
        file.write_bytes(mutate_bytes(data, draw)[: len(data)].ljust(len(data), b"\0"))
        update_file_records(checkpoint)
        return "tensors"

    cases = range(num_cases(1000, 20))
    fuzz("checkpoint: tensors", damage, use, cases, min_refused=0.1)


def test_damaged_files_without_new_checksums_are_always_refused(
    saved: Path, checkpoint: Path, use: Callable[[], None]
) -> None:
    def damage(draw: random.Random) -> str:
        restore(saved, checkpoint)
        name = draw.choice(FILES)
        valid = (checkpoint / name).read_bytes()
        changed = valid
        while changed == valid:
            changed = mutate_bytes(valid, draw)
        (checkpoint / name).write_bytes(changed)
        return name

    cases = range(num_cases(1000, 20))
    fuzz("checkpoint: any file, checksums kept", damage, use, cases, min_refused=1.0)


def test_a_planted_fault_is_found(
    saved: Path, checkpoint: Path, use: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check of the index that does not compare its pieces with the shapes and the files."""
    monkeypatch.setattr(verify, "_check_index", lambda *arguments: None)
    damage = damage_manifest(saved, checkpoint, "tensors.json")
    with pytest.raises(FuzzError, match="failures"):
        fuzz("planted", damage, use, range(60), min_refused=0.0)
