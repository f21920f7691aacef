"""A run rolls back at a loss spike, and continues as if the batches that caused it were not in the
data."""

import json
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.spikes import (
    BAD_BATCH,
    GUARD,
    PASSED_OVER,
    RUN,
    raise_loss_of_batch,
    results_of,
    run_without_batches,
    spoil_gradient_of_batch,
    stop_after,
)
from support.tiny import full_tensors, tiny_config, tiny_trainer

from switchtitan.distributed.world import stop_world
from switchtitan.errors import CheckpointError, ConfigError
from switchtitan.training.divergence import TrainingDivergedError
from switchtitan.training.loss_spikes import loss_limit
from switchtitan.training.stepper import StepResult, TrainState
from switchtitan.training.stop import NeverStop, Stopped

LATE_READS = (*GUARD, "--metrics.interval", "100", "--data.num_workers", "1")
LATE_SAVES = tuple("18" if word == "5" else word for word in GUARD)


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


@pytest.fixture(scope="module")
def without(corpora):
    """The tensors of a run whose data lacks the batches that the others pass over."""
    trainer = run_without_batches(corpora / "without-spike", "switchlora", PASSED_OVER)
    tensors = full_tensors(trainer)
    stop_world()
    return tensors


def assert_equal(trainer, expected):
    for name, tensor in full_tensors(trainer).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("spoil", "interval"), [(raise_loss_of_batch, "1"), (spoil_gradient_of_batch, "7")]
)
def test_after_a_rollback_a_run_equals_one_without_the_batches_bitwise(
    corpora, without, spoil, interval
):
    folder = corpora / f"spike-{spoil.__name__}-{interval}"
    trainer = tiny_trainer(folder, "switchlora", *GUARD, "--metrics.interval", interval)
    spoil(trainer.stepper, BAD_BATCH)
    trainer.train()
    assert_equal(trainer, without)
    results = results_of(folder)
    assert results["rollbacks"] == 1
    assert results["batches_passed_over"] == PASSED_OVER
    assert results["step"] == 20


def test_without_a_limit_the_spike_is_trained_on(corpora, without):
    """A control: the batch matters, and nothing else rolls back."""
    folder = corpora / "no-guard"
    trainer = tiny_trainer(folder, "switchlora", *RUN)
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    trainer.train()
    assert results_of(folder)["rollbacks"] == 0
    weight = "model.lm_head.weight"
    assert not torch.equal(full_tensors(trainer)[weight], without[weight])


def test_an_even_loss_causes_no_rollback(corpora):
    folder = corpora / "even"
    tiny_trainer(folder, "switchlora", *GUARD).train()
    results = results_of(folder)
    assert (results["rollbacks"], results["batches_passed_over"]) == (0, [])


@pytest.mark.parametrize(
    ("stopped_after", "resumed_at", "keys"), [(11, 10, GUARD), (17, 15, RUN)], ids=["11", "17"]
)
def test_a_resumed_run_passes_over_the_same_batches(
    corpora, without, stopped_after, resumed_at, keys
):
    """At step 11 of the second pass, the newest checkpoint is from before the rollback, so the
    resumed run rolls back itself. At step 17 the checkpoint says what was passed over, also if the
    section is no longer there."""
    folder = corpora / f"resumed-{stopped_after}"
    trainer = tiny_trainer(folder, "switchlora", *GUARD)
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    stop_after(trainer, stopped_after)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.stepper.state.passed_over == PASSED_OVER
    stop_world()
    resumed = tiny_trainer(folder, "switchlora", *keys)
    assert resumed.stepper.state.step == resumed_at
    raise_loss_of_batch(resumed.stepper, BAD_BATCH)
    resumed.train()
    assert_equal(resumed, without)
    results = results_of(folder)
    assert (results["rollbacks"], results["batches_passed_over"]) == (1, PASSED_OVER)


class StopAtTheSpike(NeverStop):
    """Stops a run after the step of the spike, if it has not rolled back yet."""

    def __init__(self, state: TrainState) -> None:
        self._state = state

    def is_due(self) -> int | None:
        is_there = self._state.step == BAD_BATCH + 1 and self._state.num_rollbacks == 0
        return signal.SIGTERM if is_there else None


def test_a_run_that_is_told_to_stop_does_not_save_a_spike_that_it_has_not_read_yet(
    corpora, without
):
    folder = corpora / "stopped-at-spike"
    trainer = tiny_trainer(folder, "switchlora", *GUARD, "--metrics.interval", "100")
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    trainer.stop = StopAtTheSpike(trainer.stepper.state)
    with pytest.raises(Stopped):
        trainer.train()
    stop_world()
    resumed = tiny_trainer(folder, "switchlora", *GUARD, "--metrics.interval", "100")
    assert resumed.stepper.state.step == 10
    raise_loss_of_batch(resumed.stepper, BAD_BATCH)
    resumed.train()
    assert_equal(resumed, without)
    assert results_of(folder)["batches_passed_over"] == PASSED_OVER


def test_too_many_rollbacks_end_the_run_and_name_the_checkpoint(corpora):
    trainer = tiny_trainer(
        corpora / "too-many", "switchlora", *GUARD, "--loss_spike.max_rollbacks", "2"
    )
    # 12 and 13 are passed over first, then 14 and the one before, 11.
    for batch in (13, 14, 15):
        raise_loss_of_batch(trainer.stepper, batch)
    with pytest.raises(
        TrainingDivergedError,
        match=r"spike at step 12: .* in batch 15 after 2 rollbacks; .*step-000000010; ",
    ):
        trainer.train()
    assert trainer.stepper.state.passed_over == [11, 12, 13, 14]


def test_a_spike_before_the_first_checkpoint_is_trained_on(corpora, caplog):
    folder = corpora / "too-early"
    trainer = tiny_trainer(folder, "switchlora", *LATE_SAVES)
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    trainer.train()
    assert "cannot roll back: there is no checkpoint yet" in caplog.text
    assert results_of(folder)["rollbacks"] == 0


def test_a_checkpoint_that_was_damaged_after_its_save_is_not_rolled_back_to(corpora):
    folder = corpora / "damaged"
    trainer = tiny_trainer(folder, "switchlora", *GUARD)
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    step = trainer.stepper.step

    def damaging_step() -> StepResult:
        if trainer.stepper.state.step == 12:
            trainer.checkpointer.finish()
            flip_a_bit(folder / "run" / "checkpoints" / "step-000000010")
        return step()

    trainer.stepper.step = damaging_step
    with pytest.raises(CheckpointError, match=r"cannot roll back .*step-000000010.* is corrupted"):
        trainer.train()
    assert trainer.stepper.state.num_rollbacks == 0


def flip_a_bit(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.distcp")
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


def test_a_nan_before_the_first_checkpoint_ends_the_run(corpora):
    folder = corpora / "too-early-nan"
    trainer = tiny_trainer(folder, "switchlora", *LATE_SAVES)
    spoil_gradient_of_batch(trainer.stepper, BAD_BATCH)
    with pytest.raises(TrainingDivergedError, match="there is no checkpoint yet"):
        trainer.train()
    assert json.loads((folder / "run" / "results.json").read_text())["diverged"]


def test_the_limit_is_the_median_plus_scaled_deviations():
    losses = [3.0, 1.0, 2.0, 2.5, 1.5, 100.0, 2.0, 2.2]
    middle = statistics.median(losses)
    deviations = sorted(abs(loss - middle) for loss in losses)
    mad = (deviations[3] + deviations[4]) / 2
    assert loss_limit(losses, 5) == pytest.approx(middle + 5 * 1.4826 * mad)
    assert loss_limit([4.0] * 8, 10) == pytest.approx(4 + 10 * 0.004)


def test_positions_map_to_batches_that_are_not_passed_over():
    state = TrainState(step=3, passed_over=[0, 2, 3, 9])
    kept = [batch for batch in range(20) if batch not in state.passed_over]
    assert [state.batch_index(position) for position in range(16)] == kept[:16]
    assert state.next_batch == kept[3]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"factor": "8", "window": "7"}, "window 7: expected"),
        ({"factor": "1.5"}, "factor 1.5: expected"),
        ({"factor": "8", "max_rollbacks": "0"}, "max_rollbacks 0: expected"),
        ({"factor": "8", "batches_before": "-1"}, "batches_before -1: expected"),
        ({"window": "20"}, "window: no effect without factor"),
        ({"factor": "8", "window": "40"}, "window = 40 is not below"),
        ({"factor": "8"}, "window = 128 is not below"),
    ],
)
def test_meaningless_keys_are_errors(corpora, keys, message):
    overrides = [word for key, value in keys.items() for word in (f"--loss_spike.{key}", value)]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        tiny_config(corpora / "meaningless", "lora", *overrides)


def test_a_run_that_is_not_saved_before_its_end_cannot_roll_back(corpora):
    overrides = ("--loss_spike.factor", "8", "--loss_spike.window", "8")
    with pytest.raises(ConfigError, match="interval = 40 is not below"):
        tiny_config(corpora / "meaningless", "lora", *overrides, "--checkpoint.interval", "40")


def test_apollo_rolls_back_to_earlier_bases(corpora):
    """Bases are not in checkpoints. The steps that run again cross a new one, after step 14."""
    expected = full_tensors(run_without_batches(corpora / "without-apollo", "apollo", PASSED_OVER))
    stop_world()
    trainer = tiny_trainer(corpora / "spike-apollo", "apollo", *LATE_READS)
    raise_loss_of_batch(trainer.stepper, BAD_BATCH)
    trainer.train()
    assert trainer.stepper.state.num_rollbacks == 1
    assert_equal(trainer, expected)
