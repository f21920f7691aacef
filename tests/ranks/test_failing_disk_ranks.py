"""Training continues when one of two ranks' disks fails, and computes the same as with a healthy
disk."""

import json
import logging
import re

import pytest
import torch
from support.checkpoints import read_tensors
from support.failing_disk import Fault, build, preloaded, set_faults
from support.ranks import run_on_ranks
from support.tiny import full_tensors, tiny_trainer

from switchtitan.checkpoint.verify import check_contents
from switchtitan.errors import CheckpointError
from switchtitan.observability import FAILED_SAVES
from switchtitan.observability.curves import read_curves

TENSORS_OF = {rank: f"*.partial/__{rank}_0.distcp" for rank in (0, 1)}
# For each rank: the faults that its saves meet, one after the other; None of them are lost.
SAVED = [
    # Files of the first rank that are not part of a checkpoint; spectra are due after step 4,
    # before its save.
    Fault("write", "*.tfevents.*", "ENOSPC"),
    None,
    Fault("create", "*/spectra/*", "EROFS"),
    Fault("write", "*.partial/metadata.json", "short"),
]
FAILED = [
    Fault("fsync", TENSORS_OF[0], "EIO"),
    Fault("write", "*.partial/tensors.json", "EIO"),
    Fault("rename", "*.partial", "EIO"),
    Fault("fsync", "*.partial", "EIO"),
]
OF_RANKS = [
    [*SAVED, *FAILED],
    [
        Fault("create", TENSORS_OF[1], "ENOSPC"),
        Fault("write", TENSORS_OF[1], "EIO"),
        Fault("write", TENSORS_OF[1], "short"),
        Fault("write", TENSORS_OF[1], "ENOSPC"),
        Fault("write", TENSORS_OF[1], "flip"),
        Fault("fsync", TENSORS_OF[1], "EIO"),
        Fault("read", TENSORS_OF[1], "EIO"),
    ],
]
NUM_FAILED = [4, 6]
NUM_STEPS = 9
LAST = f"step-{NUM_STEPS:09d}"


def trainer_of(folder, num_steps, on_failure="continue"):
    return tiny_trainer(
        folder,
        "switchlora",
        *("--training.steps", str(num_steps)),
        *("--checkpoint.interval", "1"),
        *("--checkpoint.async_save", "true"),
        *("--checkpoint.on_failure", on_failure),
        *("--metrics.tensorboard", "true"),
        *("--spectrum.interval", "4"),
        num_ranks=2,
    )


def inject(trainer, faults):
    """Each save of this rank meets the next fault."""
    save, remaining = trainer.checkpointer.save, iter(faults)

    def save_on_failing_disk(*args):
        trainer.checkpointer.finish()
        fault = next(remaining, None)
        set_faults(*([fault] if fault else []))
        save(*args)

    trainer.checkpointer.save = save_on_failing_disk


def train(folder, faults):
    trainer, lines = trainer_of(folder, NUM_STEPS), []
    inject(trainer, faults)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("switchtitan").addHandler(handler)
    trainer.train()
    logging.getLogger("switchtitan").removeHandler(handler)
    return trainer, full_tensors(trainer), "\n".join(lines)


def results_of(folder):
    return json.loads((folder / "run" / "results.json").read_text())


def train_on_failing_disks(rank, folder):
    _, expected, _ = train(folder / "healthy", [])
    for failing_rank, faults in enumerate(OF_RANKS):
        home, num_failed = folder / f"failing-{failing_rank}", NUM_FAILED[failing_rank]
        trainer, found, lines = train(home, faults if rank == failing_rank else [])
        assert trainer.checkpointer.num_failed_saves == num_failed
        check_equal(found, expected)
        last = home / "run" / "checkpoints" / LAST
        assert trainer.checkpointer.latest == last
        if rank == 0:
            check_contents(last)
            check_equal(read_tensors(last), expected)
            check_reports(home, folder / "healthy", lines, num_failed)
            if failing_rank == 0:
                assert "could not write the spectra" in lines
                assert "TensorBoard lacks points" in lines
        else:
            assert "Training continues" not in lines


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def check_reports(home, healthy, lines, num_failed):
    results = results_of(home)
    assert results[FAILED_SAVES] == num_failed
    assert FAILED_SAVES not in results_of(healthy)
    assert results["loss/validation"] == results_of(healthy)["loss/validation"]
    assert read_curves(home / "run")[FAILED_SAVES][1][-1] == num_failed
    assert lines.count("Training continues; ") == num_failed
    assert re.search(f"^failed saves +{num_failed}$", lines, re.MULTILINE)


def fail_to_the_end(rank, folder):
    """The disk of the last rank fails, in every save or in the last one."""
    fault = Fault("write", TENSORS_OF[1], "ENOSPC", times=0) if rank == 1 else None
    stop = trainer_of(folder / "stop", 4, on_failure="stop")
    inject(stop, [None, fault])
    message = error_of(stop.train)
    assert "cannot save step 2" in message
    assert "No space left on device" in message
    assert stop.checkpointer.latest.name == "step-000000001"
    # Found by the poll or the save of the next step.
    assert stop.stepper.state.step in (2, 3)
    last = trainer_of(folder / "last", 3)
    # The last step is saved again.
    inject(last, [None, fault, fault, fault])
    message = error_of(last.train)
    assert "step-000000001: cannot save step 3" in message
    if rank == 0:  # which writes them, perhaps after the others have ended
        assert results_of(folder / "last")[FAILED_SAVES] == 3
    set_faults()
    again = trainer_of(folder / "last", 3)
    assert again.stepper.state.step == 1
    again.train()
    assert again.checkpointer.latest.name == "step-000000003"


def error_of(function):
    with pytest.raises(CheckpointError) as error:
        function()
    return str(error.value)


def train_then_fail_to_the_end(rank, folder):
    train_on_failing_disks(rank, folder)
    fail_to_the_end(rank, folder)


def test_training_goes_on_and_its_weights_are_those_of_a_healthy_disk(corpora):
    folder = corpora / "failing-disk"
    folder.mkdir()
    with preloaded(build(folder)):
        run_on_ranks(2, train_then_fail_to_the_end, folder, start_method="spawn")
