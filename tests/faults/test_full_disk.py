"""A disk that fills up while a run saves: earlier checkpoints stay, the outcome is documented."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import Outcome, run
from support.fault_report import IS_LONG, record
from support.small_disk import Filler, small_disk
from support.tiny import METHOD_KEYS, TINY

from switchtitan.checkpoint import Checkpointer, metadata, save
from switchtitan.checkpoint.metadata import METADATA_CHECKSUM_FILE, METADATA_FILE
from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.checkpoint.verify import check_contents
from switchtitan.observability.metrics import FAILED_SAVES

DISK_BYTES = 16 << 20
"""Room for several checkpoints of about 0.5 MiB, and for a trace."""
NUM_STEPS, INTERVAL = 8, 2
FULL_AT, FREE_AT = 4, 6
"""The save after step 4 meets the full disk; space is freed before the save after step 6."""


def _when_file_is(name: str) -> Callable[..., bool]:
    return lambda *arguments: Path(arguments[0]).name == name


def always(*arguments: object) -> bool:
    return True


PHASES: dict[str, tuple[object, str, int, Callable[..., bool]]] = {
    "before the save": (save, "_make_partial_folder", 0, always),
    "before the tensors": (ChecksummingWriter, "write_data", 0, always),
    "in the tensors": (ChecksummingWriter, "write_data", 100 << 10, always),
    "at the end of the tensors": (ChecksummingWriter, "finish", 0, always),
    "in the indices": (ChecksummingWriter, "finish", 64 << 10, always),
    "before the metadata": (metadata, "_write_new", 0, _when_file_is(METADATA_FILE)),
    "in the metadata": (metadata, "_write_new", 4 << 10, _when_file_is(METADATA_FILE)),
    "before the checksum": (metadata, "_write_new", 0, _when_file_is(METADATA_CHECKSUM_FILE)),
    "before the rename": (save, "check_files", 0, always),
}
"""When the disk fills up -> owner and name of a function, bytes left, and which of its calls."""
CHOSEN = [*PHASES] if IS_LONG else ["in the tensors", "before the checksum"]
NOT_AFFECTED = {"before the rename"}
"""A rename takes no space."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        yield disk


def command(folder: Path, output_dir: Path, on_failure: str, *keys: object) -> tuple[object, ...]:
    folder.mkdir(exist_ok=True)
    text = TINY.format(folder=folder, method="switchlora", method_keys=METHOD_KEYS["switchlora"])
    (folder / "run.toml").write_text(text)
    return (
        "train", "--config", folder / "run.toml", "--job.output_dir", output_dir,
        "--training.steps", NUM_STEPS, "--checkpoint.interval", INTERVAL,
        "--checkpoint.on_failure", on_failure, "--checkpoint.keep_latest", 2,
        "--evaluation.interval", 4, "--spectrum.interval", 1, "--metrics.tensorboard", "true",
        "--profiler.enabled", "true", "--profiler.start_step", FULL_AT + 1,
        "--profiler.num_steps", 1, *keys,
    )  # fmt: skip


def fill_in(monkeypatch: pytest.MonkeyPatch, filler: Filler, phase: str) -> None:
    """The disk fills up in a phase of the save of step `FULL_AT`."""
    owner, name, num_bytes_left, is_call = PHASES[phase]
    function, saved_steps = getattr(owner, name), [0]
    start = Checkpointer.save

    def started(checkpointer: Checkpointer, step: int, *arguments: Any) -> None:
        checkpointer.finish()
        if step == FREE_AT:
            filler.free()
        saved_steps.append(step)
        start(checkpointer, step, *arguments)

    def filling(*arguments: Any, **keys: Any) -> Any:
        if saved_steps[-1] == FULL_AT and is_call(*arguments):
            filler.fill(num_bytes_left)
        return function(*arguments, **keys)

    monkeypatch.setattr(Checkpointer, "save", started)
    monkeypatch.setattr(owner, name, filling)


def tensors_of(output_dir: Path, step: int) -> dict[str, str]:
    """Checksums of the files with the tensors of a checkpoint, which is whole."""
    saved = check_contents(output_dir / "checkpoints" / f"step-{step:09d}")
    assert saved.step == step
    return {name: file.sha256 for name, file in saved.files.items() if name.endswith(".distcp")}


def steps_of(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def expected(corpora: Path) -> dict[str, str]:
    """The tensors after the last step of a run on a large disk."""
    folder = corpora / "large-disk"
    outcome = run(*command(folder, folder / "run", "stop"))
    assert outcome.status == 0, outcome
    return tensors_of(folder / "run", NUM_STEPS)


def check_no_traceback(outcome: Outcome) -> None:
    assert "Traceback" not in outcome.output + outcome.errors, outcome


@pytest.mark.parametrize("is_async", [False, True] if IS_LONG else [False])
@pytest.mark.parametrize("phase", CHOSEN)
def test_a_run_goes_on_and_saves_again_when_space_is_freed(
    corpora: Path,
    disk: Path,
    expected: dict[str, str],
    phase: str,
    is_async: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill_in(monkeypatch, Filler(disk), phase)
    keys = ("--checkpoint.async_save", str(is_async).lower())
    outcome = run(*command(corpora / "full-disk", disk / "run", "continue", *keys))
    assert outcome.status == 0, outcome
    check_no_traceback(outcome)
    results = json.loads((disk / "run" / "results.json").read_text())
    num_failed = 0 if phase in NOT_AFFECTED else 1
    assert results.get(FAILED_SAVES, 0) == num_failed
    if num_failed:
        assert re.search(
            rf"cannot save step {FULL_AT} .*(No space left|too little space).* are free",
            outcome.output,
        )
        newest = f"newest complete checkpoint is {disk}/run/checkpoints/step-{INTERVAL:09d}"
        assert newest in outcome.output
    assert steps_of(disk / "run") == [f"step-{step:09d}" for step in (FREE_AT, NUM_STEPS)]
    assert tensors_of(disk / "run", NUM_STEPS) == expected
    # What else is written meanwhile is dropped, with a warning. A background save may end later.
    for lacking in (
        f"could not write the spectra of step {FULL_AT + 1}",
        "TensorBoard lacks points until that succeeds",
        f"no trace was written to {disk}/run/tensorboard",
    ):
        assert is_async or lacking in outcome.output, lacking
    assert not [
        path.name for path in disk.rglob("*") if path.suffix in (".new", ".tmp", ".partial")
    ]
    record("full disk", fills_up=phase, on_failure="continue", runs=1, failed_saves=num_failed)


@pytest.mark.parametrize("phase", [phase for phase in CHOSEN if phase not in NOT_AFFECTED])
def test_a_run_stops_and_the_same_command_goes_on_when_space_is_freed(
    corpora: Path,
    disk: Path,
    expected: dict[str, str],
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filler = Filler(disk)
    fill_in(monkeypatch, filler, phase)
    words = command(corpora / "full-disk", disk / "run", "stop")
    outcome = run(*words)
    outcome.check_refused(
        f"cannot save step {FULL_AT}", "are free", "Older checkpoints are untouched"
    )
    check_no_traceback(outcome)
    assert steps_of(disk / "run") == [f"step-{INTERVAL:09d}"]
    tensors_of(disk / "run", INTERVAL)
    # Nothing can be written yet: the run says so before it trains.
    again = run(*words)
    again.check_refused(str(disk / "run"))
    check_no_traceback(again)
    assert steps_of(disk / "run") == [f"step-{INTERVAL:09d}"]
    monkeypatch.undo()
    filler.free()
    assert run(*words).status == 0
    assert tensors_of(disk / "run", NUM_STEPS) == expected
    record("full disk", fills_up=phase, on_failure="stop", runs=1, failed_saves=1)


def test_a_disk_that_is_full_at_the_end_leaves_the_checkpoint_and_an_error(
    corpora: Path, disk: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of `results.json`, which the same command writes later."""
    from switchtitan.observability.metrics import Reporter

    filler, summary = Filler(disk), Reporter.summary

    def filling(*arguments: Any, **keys: Any) -> None:
        filler.fill()
        summary(*arguments, **keys)

    monkeypatch.setattr(Reporter, "summary", filling)
    words = command(corpora / "full-disk", disk / "run", "stop")
    outcome = run(*words)
    outcome.check_refused("results.json", "cannot be written")
    check_no_traceback(outcome)
    assert tensors_of(disk / "run", NUM_STEPS) == expected
    monkeypatch.undo()
    filler.free()
    assert run(*words).status == 0
    assert json.loads((disk / "run" / "results.json").read_text())["step"] == NUM_STEPS
    record("full disk", fills_up="before results.json", on_failure="stop", runs=1, failed_saves=0)


def test_a_disk_that_does_not_fill_up_fails_no_save(
    corpora: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks above can fail."""
    monkeypatch.setattr(Filler, "fill", lambda *arguments: None)
    fill_in(monkeypatch, Filler(disk), "in the tensors")
    outcome = run(*command(corpora / "full-disk", disk / "run", "continue"))
    assert outcome.status == 0
    assert FAILED_SAVES not in json.loads((disk / "run" / "results.json").read_text())
    assert "lacks points" not in outcome.output
