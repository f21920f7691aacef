"""Training continues when one rank's disk fails, and computes the same as with a healthy disk."""

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.checkpoints import read_tensors
from support.disk_faults import CASES, Case
from support.failing_disk import Fault, build, preloaded, set_faults
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_trainer

from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError
from switchtitan.observability import FAILED_SAVES
from switchtitan.observability.curves import read_curves
from switchtitan.training.trainer import Trainer

OF_FIRST_RANK = tuple(
    case
    for name, case in CASES.items()
    if name.endswith((": EIO", ": short", ": flip")) and not name.startswith("create")
)
OF_SECOND_RANK = tuple(
    Case((Fault(operation, "*.partial/__1_0.distcp", outcome),), is_saved=outcome == "short")
    for operation, outcome in [
        ("create", "ENOSPC"),
        ("write", "EIO"),
        ("write", "ENOSPC"),
        ("write", "short"),
        ("write", "flip"),
        ("fsync", "EIO"),
        ("read", "EIO"),
    ]
)
METRICS = (
    Case((Fault("write", "*.tfevents.*", "ENOSPC"),), is_saved=True),
    Case((), is_saved=True),
    Case((Fault("create", "*/spectra/*", "EROFS"),), is_saved=True),
)
"""Files of the first rank that are not part of a checkpoint; spectra are due after step 4."""


def trainer_of(
    folder: Path, num_ranks: int, num_steps: int, on_failure: str = "continue"
) -> Trainer:
    return tiny_trainer(
        folder,
        "switchlora",
        *("--training.steps", str(num_steps)),
        *("--checkpoint.interval", "1"),
        *("--checkpoint.async_save", "true"),
        *("--checkpoint.on_failure", on_failure),
        *("--metrics.tensorboard", "true"),
        *("--spectrum.interval", "4"),
        num_ranks=num_ranks,
    )


def inject(trainer: Trainer, has_faults: bool, cases: Sequence[Case]) -> None:
    """Each save of a rank that has faults meets the next case."""
    save, remaining = trainer.checkpointer.save, iter(cases)

    def save_on_failing_disk(*args) -> None:
        trainer.checkpointer.finish()
        case = next(remaining, None)
        if has_faults:
            set_faults(*(case.faults if case else ()))
        save(*args)

    trainer.checkpointer.save = save_on_failing_disk


def train(folder: Path, num_ranks: int, num_steps: int, failing: bool, cases: Sequence[Case]):
    trainer = trainer_of(folder, num_ranks, num_steps)
    inject(trainer, failing, cases)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("switchtitan").addHandler(handler)
    trainer.train()
    logging.getLogger("switchtitan").removeHandler(handler)
    return trainer, full_tensors(trainer), "\n".join(lines)


def train_on_failing_disks(rank: int, folder: Path, num_ranks: int) -> None:
    # A third of them on two ranks, where steps take longer.
    of_first = OF_FIRST_RANK[::2] if num_ranks == 1 else OF_FIRST_RANK[1::6]
    of_ranks = [(*METRICS, *of_first), OF_SECOND_RANK][:num_ranks]
    num_steps = max(map(len, of_ranks)) + 1
    _, expected, _ = train(folder / "healthy", num_ranks, num_steps, False, ())
    healthy = json.loads((folder / "healthy" / "run" / "results.json").read_text())
    assert FAILED_SAVES not in healthy
    for failing_rank, cases in enumerate(of_ranks):
        home = folder / f"failing-{failing_rank}"
        trainer, found, lines = train(home, num_ranks, num_steps, rank == failing_rank, cases)
        num_failed = sum(not case.is_saved for case in cases)
        assert trainer.checkpointer.num_failed_saves == num_failed
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        last = home / "run" / "checkpoints" / f"step-{num_steps:09d}"
        assert trainer.checkpointer.latest == last
        check_contents(last)
        if rank == 0:
            saved = read_tensors(last)
            assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
            results = json.loads((home / "run" / "results.json").read_text())
            assert results[FAILED_SAVES] == num_failed
            assert results["loss/validation"] == healthy["loss/validation"]
            assert read_curves(home / "run")[FAILED_SAVES][1][-1] == num_failed
            message = "Training continues; the newest complete checkpoint is"
            assert lines.count(message) == num_failed
            assert re.search(f"^failed saves +{num_failed}$", lines, re.MULTILINE)
            if failing_rank == 0:
                assert "could not write the spectra" in lines
                assert "TensorBoard lacks points until that succeeds" in lines
        else:
            assert "Training continues" not in lines


def error_of(function: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as error:
        function()
    return str(error.value)


def fail_to_the_end(rank: int, folder: Path, num_ranks: int) -> None:
    """The disk of the last rank fails, in every save or in the last one."""
    fault = Fault("write", f"*.partial/__{num_ranks - 1}_0.distcp", "ENOSPC", times=0)
    failing = rank == num_ranks - 1
    stop = trainer_of(folder / "stop", num_ranks, 4, on_failure="stop")
    inject(stop, failing, [Case(()), Case((fault,))])
    message = error_of(stop.train)
    assert "cannot save step 2" in message
    assert "No space left on device" in message
    assert stop.checkpointer.latest.name == "step-000000001"
    # Found by the poll or the save of the next step.
    assert stop.stepper.state.step in (2, 3)
    last = trainer_of(folder / "last", num_ranks, 3)
    # The last step is saved again.
    inject(last, failing, [Case(()), Case((fault,)), Case((fault,)), Case((fault,))])
    message = error_of(last.train)
    assert "the last checkpoint was not saved, the same command resumes from" in message
    assert "step-000000001: cannot save step 3" in message
    if rank == 0:  # which writes them, perhaps after the others have ended
        assert json.loads((folder / "last" / "run" / "results.json").read_text())[FAILED_SAVES] == 3
    set_faults()
    again = trainer_of(folder / "last", num_ranks, 3)
    assert again.stepper.state.step == 1
    again.train()
    assert again.checkpointer.latest.name == "step-000000003"


def train_then_fail_to_the_end(rank: int, folder: Path, num_ranks: int) -> None:
    train_on_failing_disks(rank, folder, num_ranks)
    fail_to_the_end(rank, folder, num_ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_goes_on_and_its_weights_are_those_of_a_healthy_disk(corpora, num_ranks):
    folder = corpora / f"failing-disk-{num_ranks}"
    folder.mkdir()
    with preloaded(build(folder)):
        run_on_ranks(num_ranks, train_then_fail_to_the_end, folder, num_ranks, start_method="spawn")
