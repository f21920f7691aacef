"""Any file of a run is damaged, then the same command is given again.

The run uses the previous checkpoint, or refuses by name, or the damage is harmless. Where it goes
on, its end is bitwise that of the undisturbed run: never a wrong weight, nor another run's state.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.damages import IN_PLACE, INTERVAL, NUM_STEPS, Damage, delete, make_run, swap_in, train
from support.fault_report import IS_LONG, record

from switchtitan.checkpoint import read_metadata, verify
from switchtitan.checkpoint.verify import check_contents
from switchtitan.data import corpus

END = NUM_STEPS + INTERVAL
NEWEST, PREVIOUS = f"step-{NUM_STEPS:09d}", f"step-{NUM_STEPS - INTERVAL:09d}"
CHECKPOINT_FILES = (
    "metadata.json", "metadata.json.sha256", "tensors.json", "__0_0.distcp", ".metadata",
)  # fmt: skip
FILES = {
    **{
        f"newest checkpoint: {name}": f"run/checkpoints/{NEWEST}/{name}"
        for name in CHECKPOINT_FILES
    },
    **{
        f"previous checkpoint: {name}": f"run/checkpoints/{PREVIOUS}/{name}"
        for name in CHECKPOINT_FILES
    },
    "corpus: index.json": "corpora/pystdlib-*/index.json",
    "corpus: checksum of the index": "corpora/pystdlib-*/index.json.sha256",
    "corpus: tokenizer.json": "corpora/pystdlib-*/tokenizer.json",
    "corpus: training tokens": "corpora/pystdlib-*/train-00000.bin",
    "corpus: validation tokens": "corpora/pystdlib-*/validation-*.bin",
    "initial weights": "weights.safetensors",
    "spectra": f"run/spectra/{NEWEST}.safetensors",
    "results.json": "run/results.json",
    "TensorBoard's events": "run/tensorboard/events.*",
    "config.toml": "run/config.toml",
    "train.log": "run/train.log",
}
"""Kind of a file -> its place in the run's home."""
SHORT = ("newest checkpoint: __0_0.distcp", "corpus: index.json", "initial weights", "train.log")
FOLDERS = {
    "newest checkpoint: folder": f"run/checkpoints/{NEWEST}",
    "previous checkpoint: folder": f"run/checkpoints/{PREVIOUS}",
    "all checkpoints: folder": "run/checkpoints",
    "corpus: folder": "corpora/pystdlib-*/",
    "spectra: folder": "run/spectra",
    "TensorBoard: folder": "run/tensorboard",
}
STARTS = {
    f"resuming from FOLDER/checkpoints/{NEWEST}": "harmless",
    f"resuming from FOLDER/checkpoints/{PREVIOUS}": "previous checkpoint used",
    "starting a new run in FOLDER": "started over",
}
"""What a run logs -> its outcome."""


@dataclass(frozen=True)
class Runs:
    """A finished run, its copy, another run of the same shapes, and how the first one continues."""

    home: Path
    pristine: Path
    other: Path
    end: dict

    def restore(self) -> None:
        shutil.rmtree(self.home)
        shutil.copytree(self.pristine, self.home)


def end_of(home: Path) -> dict:
    """What a run leaves after its last step: equal for equal runs."""
    metadata = check_contents(home / "run" / "checkpoints" / f"step-{END:09d}")
    results = json.loads((home / "run" / "results.json").read_text())
    spectra = home / "run" / "spectra" / f"step-{END:09d}.safetensors"
    return {
        "tensors": {
            name: file.sha256
            for name, file in metadata.files.items()
            if name != ".metadata"  # holds the save's random id
        },
        "state": json.loads(json.dumps(metadata.train_state)),
        "results": {key: results[key] for key in ("step", "loss/validation", "seed", "corpus")},
        "spectra": spectra.read_bytes(),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("damages")
    home, pristine, other = folder / "run", folder / "pristine", folder / "other"
    make_run(home, seed=3, max_bytes=60_000)
    make_run(other, seed=4, max_bytes=150_000)
    shutil.copytree(home, pristine)
    assert train(home, END).status == 0
    return Runs(home, pristine, other, end_of(home))


def place(home: Path, pattern: str) -> Path:
    (found,) = home.glob(pattern)
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_use(runs: Runs, names: tuple[str, ...]) -> str:
    """Gives the command again and checks its outcome, which is returned.

    Args:
        names: one of these is in the message of a refusal.
    """
    before = contents(runs.home)
    outcome = train(runs.home, END)
    if outcome.status == 2:
        outcome.check_refused()
        assert any(name in outcome.errors for name in names), outcome.errors
        # So the undamaged file, put back, is all that the run needs.
        assert contents(runs.home) == before
        return "refused"
    assert outcome.status == 0, (outcome.output[-3000:], outcome.errors[-3000:])
    assert end_of(runs.home) == runs.end
    for start, name in STARTS.items():
        if f"{start}\n" in outcome.output.replace(f"{runs.home}/run", "FOLDER"):
            return name
    raise AssertionError(outcome.output)


def damages_of(kind: str, runs: Runs) -> Iterator[tuple[str, Damage]]:
    """Yields name and damage of each way to damage a kind of file."""
    yield from IN_PLACE.items()
    pattern = FILES[kind]
    yield "swapped with another run's", swap_in(place(runs.other, pattern))
    if (NEWEST in pattern) or (PREVIOUS in pattern):
        step = PREVIOUS if NEWEST in pattern else NEWEST
        sibling = pattern.replace(NEWEST, step).replace(PREVIOUS, step)
        yield "swapped with another step's", swap_in(place(runs.pristine, sibling))


NEVER_READ = ("results.json", "spectra", "TensorBoard's events", "config.toml", "train.log")
"""By a run that trains on: later files are written next to them."""


def expected_outcome(kind: str, name: str) -> str:
    if kind.startswith("newest checkpoint"):
        return "previous checkpoint used"
    if kind.startswith("previous checkpoint") or kind in NEVER_READ:
        return "harmless"
    if (kind, name) == ("corpus: checksum of the index", "deleted"):
        return "harmless"  # as in a corpus of version 0.2.0
    return "refused"


@pytest.mark.parametrize("kind", FILES if IS_LONG else SHORT)
def test_a_damaged_file(runs: Runs, kind: str) -> None:
    chosen = [*damages_of(kind, runs)]
    if not IS_LONG:
        chosen = [random.Random(kind).choice(chosen)]
    outcomes: Counter[str] = Counter()
    for number, (name, damage) in enumerate(chosen):
        runs.restore()
        file = place(runs.home, FILES[kind])
        before = file.read_bytes()
        damage(file, random.Random(f"{kind} {number}"))
        if file.exists() and file.read_bytes() == before:
            # Where tensors are stored is equal in runs of the same shapes.
            assert file.name == "tensors.json", name
            continue
        outcome = check_use(runs, (file.name, str(file.parent)))
        assert outcome == expected_outcome(kind, name), (name, outcome)
        outcomes[outcome] += 1
    record_outcomes(kind, outcomes)


def record_outcomes(kind: str, outcomes: Counter[str]) -> None:
    names = ("previous checkpoint used", "refused", "harmless", "started over")
    counts = {name.replace(" ", "_"): outcomes[name] for name in names}
    record("damages", file=kind, damages=outcomes.total(), **counts)


@pytest.mark.skipif(not IS_LONG, reason="part of the long form")
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_is_deleted_or_another_runs(runs: Runs, kind: str) -> None:
    swap = swap_in(place(runs.other, FOLDERS[kind]))
    outcomes: Counter[str] = Counter()
    expected = {
        "newest checkpoint: folder": ["previous checkpoint used", "refused"],
        "all checkpoints: folder": ["started over", "refused"],
        # Prepared again, the corpus is the same.
        "corpus: folder": ["harmless", "refused"],
    }.get(kind, ["harmless", "harmless"])
    for damage, outcome in zip((delete, swap), expected, strict=True):
        runs.restore()
        damage(place(runs.home, FOLDERS[kind]), random.Random(kind))
        found = check_use(runs, ("the checkpoint belongs to another run",))
        assert found == outcome, damage
        outcomes[found] += 1
    record_outcomes(kind, outcomes)


@pytest.mark.parametrize("name", IN_PLACE if IS_LONG else ["one bit"])
def test_damage_to_all_checkpoints(runs: Runs, name: str) -> None:
    runs.restore()
    for step in (NEWEST, PREVIOUS):
        file = place(runs.home, f"run/checkpoints/{step}/__0_0.distcp")
        IN_PLACE[name](file, random.Random(f"{name} {step}"))
    assert check_use(runs, (str(runs.home / "run" / "checkpoints"),)) == "refused"
    record_outcomes("all checkpoints: __0_0.distcp", Counter({"refused": 1}))


@pytest.mark.parametrize("name", [*IN_PLACE, "swapped"] if IS_LONG else ["swapped"])
def test_damaged_results_of_a_finished_run(runs: Runs, name: str) -> None:
    """The same command has nothing to train. Other numbers in the file have no checksum."""
    runs.restore()
    file = place(runs.home, "run/results.json")
    expected = json.loads(file.read_text())
    damages = {**IN_PLACE, "swapped": swap_in(runs.other / "run" / "results.json")}
    damages[name](file, random.Random(name))
    assert train(runs.home, NUM_STEPS).status == 0
    found = json.loads(file.read_text())
    for key in ("step", "loss/validation", "seed", "corpus"):
        assert found[key] == expected[key], key
    record_outcomes("results.json of a finished run", Counter({"harmless": 1}))


PLANTS: dict[str, tuple[object, str, Callable]] = {
    f"run/checkpoints/{NEWEST}/__0_0.distcp": (
        verify,
        "_read_record",
        lambda file, on_bytes: read_metadata(file.parent).files[file.name],
    ),
    "corpora/pystdlib-*/train-00000.bin": (corpus, "verify_files", lambda *arguments: None),
}
"""A file -> the owner and the name of what compares its checksum, and what passes everything."""


@pytest.mark.parametrize("pattern", PLANTS)
def test_damage_is_found_only_by_checksums(
    runs: Runs, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the run trains with wrong values, which the comparison of its end shows."""
    runs.restore()
    file = place(runs.home, pattern)
    if file.suffix == ".bin":
        file.write_bytes(np.flip(np.fromfile(file, dtype=np.uint16)).tobytes())
    else:
        shutil.copyfile(place(runs.other, pattern), file)
    assert file.read_bytes() != place(runs.pristine, pattern).read_bytes()
    monkeypatch.setattr(*PLANTS[pattern])
    with pytest.raises(AssertionError, match="tensors"):
        check_use(runs, ())
