"""A run evaluates, saves and stops when due, also if gradients are not finite or ranks disagree."""

import gc
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.leftovers import least_growth, num_tensors
from support.spoiled import spoil_next_gradient
from support.tiny import METHOD_KEYS, MINI, full_tensors, tiny_config, tiny_trainer, train_steps

from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.data import open_corpus
from switchtitan.distributed.world import stop_world
from switchtitan.errors import RanksDisagreeError
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.training.divergence import TrainingDivergedError
from switchtitan.training.stepper import StepResult
from switchtitan.training.trainer import RunSchedule, Trainer

SKIP = ("--training.on_nonfinite", "skip")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def test_a_gradient_that_is_not_finite_stops_the_run_and_nothing_is_saved(corpora):
    trainer = tiny_trainer(
        corpora / "stopped", "switchlora", "--training.steps", "3", "--metrics.interval", "100"
    )
    spoil_next_gradient(trainer.stepper)
    with pytest.raises(TrainingDivergedError, match=r"on_nonfinite"):
        trainer.train()
    trainer.stepper.close()
    assert not list((corpora / "stopped" / "run").glob("checkpoints/step-*"))


def rows_differ(trainer: Trainer) -> None:
    trainer.stepper.optimizer._exchange._disagreement.fill_(True)


def weights_differ(trainer: Trainer) -> None:
    def check_replicas() -> None:
        raise RanksDisagreeError("ranks no longer hold the same weights")

    trainer.tensors.check_replicas = check_replicas


@pytest.mark.parametrize("spoil", [rows_differ, weights_differ])
def test_a_save_in_progress_is_finished_when_ranks_disagree(corpora, monkeypatch, spoil):
    intervals = (
        "--checkpoint.interval",
        "2",
        "--evaluation.interval",
        "3",
        "--checkpoint.async_save",
        "true",
    )
    trainer = tiny_trainer(corpora / f"disagree-{spoil.__name__}", "switchlora", *intervals)
    may_write, write_data = threading.Event(), ChecksummingWriter.write_data

    def write_when_allowed(*args: Any) -> Any:
        assert may_write.wait(60)
        return write_data(*args)

    monkeypatch.setattr(ChecksummingWriter, "write_data", write_when_allowed)
    step = trainer.stepper.step

    def step_then_spoil() -> StepResult:
        result = step()
        if trainer.stepper.state.step == 3:
            assert trainer.checkpointer.latest is None
            spoil(trainer)
            # The save is still in progress when the error is raised.
            threading.Timer(0.5, may_write.set).start()
        return result

    trainer.stepper.step = step_then_spoil
    with pytest.raises(RanksDisagreeError):
        trainer.train()
    assert trainer.stepper.state.step == 3
    assert trainer.checkpointer.latest.name == "step-000000002"


def test_a_run_with_a_skipped_update_takes_all_its_steps_and_reports_finite_losses(corpora):
    trainer = tiny_trainer(corpora / "skip-run", "switchlora", *SKIP, "--training.steps", "4")
    spoil_next_gradient(trainer.stepper)
    reported = {}
    report = trainer.reporter.report
    trainer.reporter.report = lambda step, values: (
        reported.update({step: values}),
        report(step, values),
    )
    trainer.train()
    assert trainer.stepper.state.step == 4
    assert trainer.stepper.state.num_skipped == 1
    losses = [values["loss/train"] for values in reported.values() if "loss/train" in values]
    assert losses
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_evaluation_changes_no_tensor_and_is_deterministic(corpora, method):
    has_dropout = "dropout" in METHODS[method.removesuffix(MINI)].config_type.model_fields
    extra = ("--method.dropout", "0.3") if has_dropout else ()
    trainer = tiny_trainer(corpora / "evaluated", method, *extra)
    train_steps(trainer, 2)
    before = full_tensors(trainer)
    first, second = (
        trainer.evaluators.validation(trainer.stepper.model),
        trainer.evaluators.validation(trainer.stepper.model),
    )
    after = full_tensors(trainer)
    trainer.stepper.close()
    # Dropout is off, so the same weights give the same loss.
    assert first == second
    assert trainer.stepper.model.training
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


TEST_SPLIT = (
    "--data.test_fraction",
    "0.1",
    "--evaluation.test_tokens",
    "320",
    "--training.steps",
    "4",
)


def test_the_trained_model_is_evaluated_once_on_the_test_split(corpora):
    trainer = tiny_trainer(corpora / "test-split", "full_rank", *TEST_SPLIT)
    trainer.train()
    results = json.loads((corpora / "test-split" / "run" / "results.json").read_text())
    assert results["step"] == 4
    assert results["tokens_seen"] == 4 * 8 * 16
    assert results["loss/test"] == trainer.evaluators.test(trainer.stepper.model)
    assert results["loss/test"] != trainer.evaluators.validation(trainer.stepper.model)
    corpus = open_corpus(tiny_config(corpora / "test-split", "full_rank", *TEST_SPLIT).data)
    sequences = corpus.split("test", 16)
    num_scored = 16 * len(sequences)
    assert num_scored < 320, "the split is shorter than test_tokens"
    scored = sequences.read(0, num_scored + 1)[1:].tolist()
    text = corpus.tokenizer().tokenizer.decode(scored, skip_special_tokens=True)
    bits = results["loss/test"] * num_scored / math.log(2)
    assert results["bits_per_byte/test"] == pytest.approx(bits / len(text.encode()))
    assert results["bits_per_byte/validation"] is None, "the run is too short for an evaluation"
    plain = MODELS.build(tiny_config(corpora / "test-split", "full_rank").model)
    num_trained = sum(parameter.numel() for parameter in plain.parameters())
    assert results["num_parameters"] == {"trainable": num_trained, "frozen": 0, "buffers": 0}
    # Weights and two moments in fp32, and a step count for each tensor.
    num_tensors = len(list(plain.parameters()))
    assert results["memory/state_gib"] * 2**30 == 4 * (3 * num_trained + num_tensors)


def test_a_run_stopped_before_its_results_writes_them_when_resumed(corpora):
    folder, file = corpora / "late-results", corpora / "late-results" / "run" / "results.json"
    tiny_trainer(folder, "full_rank", *TEST_SPLIT).train()
    results = json.loads(file.read_text())
    file.unlink()
    tiny_trainer(folder, "full_rank", *TEST_SPLIT).train()
    again = json.loads(file.read_text())
    assert again["throughput/tokens_per_s"] is None
    for key in ("step", "loss/validation", "loss/test", "corpus"):
        assert again[key] == results[key]
    written_at = file.stat().st_mtime_ns
    tiny_trainer(folder, "full_rank", *TEST_SPLIT).train()
    assert file.stat().st_mtime_ns == written_at


def note_at_steps(trainer: Trainer, note: Callable[[], object]) -> list[object]:
    """A list that the run fills with what `note` returns at the beginning of each step."""
    noted: list[object] = []
    step = trainer.stepper.step

    def noting() -> StepResult:
        noted.append(note())
        return step()

    trainer.stepper.step = noting
    return noted


def test_results_state_the_loss_of_the_last_step_also_if_the_interval_grew(corpora):
    folder = corpora / "interval-grew"
    save = ("--checkpoint.interval", "2")
    tiny_trainer(
        folder, "lora", *save, "--training.steps", "2", "--evaluation.interval", "2"
    ).train()
    trainer = tiny_trainer(
        folder, "lora", *save, "--training.steps", "4", "--evaluation.interval", "100"
    )
    trainer.train()
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["step"] == 4
    assert results["loss/validation"] == trainer.evaluators.validation(trainer.stepper.model)


def test_python_s_collector_is_disabled_while_training(corpora):
    trainer = tiny_trainer(corpora / "collects", "full_rank", "--training.steps", "4")
    may_collect = note_at_steps(trainer, gc.isenabled)
    trainer.train()
    assert may_collect == [True, False, False, False]
    assert gc.isenabled()


def test_python_s_collector_is_enabled_after_training_that_diverged(corpora):
    trainer = tiny_trainer(corpora / "collects-diverged", "full_rank")
    spoil_next_gradient(trainer.stepper)
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    assert gc.isenabled()


@pytest.mark.parametrize(("num_steps", "interval"), [(10, 3), (9, 3), (2, 5), (5, 1)])
def test_the_number_of_saves_is_foretold(num_steps, interval):
    schedule = RunSchedule(num_steps, evaluate_interval=1, save_interval=interval)
    for start in range(num_steps + 2):
        due = [s for s in range(start + 1, num_steps + 1) if s % interval == 0 or s == num_steps]
        assert schedule.num_saves_after(start) == len(due)


class NoteCalls:
    """A hook that is due after every second step."""

    def __init__(self) -> None:
        self.around_steps: list[int] = []
        self.after_steps: list[int] = []

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        self.around_steps.append(step)
        yield

    def is_due(self, step: int) -> bool:
        return step % 2 == 0

    def after(self, step: int) -> None:
        self.after_steps.append(step)

    def results(self) -> dict[str, float | None]:
        return {"noted": float(len(self.after_steps))}


def test_a_hook_is_called_around_every_step_and_after_the_steps_when_it_is_due(corpora):
    folder, hook = corpora / "hooks", NoteCalls()
    trainer = tiny_trainer(folder, "full_rank", *SKIP, "--training.steps", "5")
    trainer.hooks = [hook]
    spoil_next_gradient(trainer.stepper)
    trainer.train()
    # The update of the first batch is skipped.
    assert hook.around_steps == [1, 1, 2, 3, 4, 5]
    assert hook.after_steps == [2, 4]
    assert json.loads((folder / "run" / "results.json").read_text())["noted"] == 2


EVERY_FIVE_STEPS = [
    word for key in ("evaluation", "checkpoint", "spectrum") for word in (f"--{key}.interval", "5")
]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["--checkpoint.async_save", "true"],
        ["--activation_checkpoint.mode", "full", "--activation_checkpoint.offload", "true"],
        ["--method.candidates_device", "host"],
        ["--method.candidates", "constant"],
    ],
    ids=["saves", "background", "offload", "host", "constant"],
)
def test_evaluating_saving_and_inspecting_leave_no_tensors_to_the_garbage_collection(
    corpora, overrides, request
):
    """Python collects no garbage between the first step and the fortieth."""
    folder = corpora / f"leftovers-{request.node.callspec.id}"
    trainer = tiny_trainer(folder, "switchlora", *EVERY_FIVE_STEPS, *overrides)
    stepper, counts = trainer.stepper, []

    def count_every_ten_steps() -> None:
        # Counting takes longer than a step. Ten steps have two evaluations, saves and inspections.
        if stepper.state.step % 10 == 9:
            counts.append(num_tensors())

    note_at_steps(trainer, count_every_ten_steps)
    trainer.train()
    assert len(counts) == 4
    assert least_growth(counts) <= 0
