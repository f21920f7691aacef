"""The frame adds nothing to a plain loop, and does what it says with gradients that are not finite."""

import gc
import json
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.leftovers import least_growth, num_tensors
from support.tiny import METHOD_KEYS, MINI, tiny_config, tiny_trainer, train_steps, whole_tensors
from torch import nn

from switchtitan.checkpoint.storage import ChecksummingWriter
from switchtitan.distributed.world import stop_world
from switchtitan.errors import RanksDisagreeError
from switchtitan.methods import METHODS
from switchtitan.models import MODELS
from switchtitan.models.loss import CrossEntropy
from switchtitan.training.stepper import StepResult
from switchtitan.training.trainer import Trainer, TrainingDivergedError

SKIP = ("--training.on_nonfinite", "skip")


@pytest.fixture(autouse=True)
def leave_world() -> Iterator[None]:
    yield
    stop_world()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    prefix = "model."
    return {k.removeprefix(prefix): v for k, v in whole_tensors(trainer).items() if k.startswith(prefix)}


def spoil_next_gradient(trainer: Trainer) -> None:
    """Makes the loss of the next micro-batch inf, as an overflow would, and those after it as they are."""
    summed_loss = trainer.stepper.loss

    def overflowing(*args: Any, **kwargs: Any) -> torch.Tensor:
        trainer.stepper.loss = summed_loss
        return summed_loss(*args, **kwargs) * math.inf

    trainer.stepper.loss = overflowing


def plain_learning_rate(step: int) -> float:
    """Warm-up over 3 steps, then half a cosine from 1e-2 to its tenth at step 40."""
    if step < 3:
        return 1e-2 * ((step + 1) / 3)
    return 1e-2 * (0.1 + (1 - 0.1) * (0.5 * (1 + math.cos(math.pi * ((step - 3) / (40 - 3))))))


def test_full_rank_training_equals_a_plain_loop_bitwise(corpora):
    ours = tiny_trainer(corpora / "plain", "full_rank")
    config = tiny_config(corpora / "plain", "full_rank")
    model = MODELS.build(config.model)
    model.load_state_dict(weights(ours))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    read = [next(ours.stepper.batches) for _ in range(20)]
    ours.stepper.close()
    ours.stepper.batches = iter(read)
    for step, micro_batches in enumerate(read):
        loss_ours = ours.stepper.step().loss
        for group in optimizer.param_groups:
            group["lr"] = plain_learning_rate(step)
        num_targets = sum(batch.targets.numel() for batch in micro_batches)
        loss_plain = torch.zeros(())
        for batch in micro_batches:
            hidden = model.model(batch.tokens, batch.document_ids)
            # It rounds otherwise than torch's, which the next test compares it with.
            loss = CrossEntropy(compile_regions=False)(hidden, model.lm_head, batch.targets, num_targets)
            loss.backward()
            loss_plain += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss_ours, loss_plain), step
    for name, weight in weights(ours).items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_step_of_several_micro_batches_has_the_loss_and_gradients_that_torch_finds_in_one(corpora):
    trainer = tiny_trainer(corpora / "torch-loss", "full_rank")
    model = MODELS.build(tiny_config(corpora / "torch-loss", "full_rank").model)
    model.load_state_dict(weights(trainer))
    micro_batches = next(trainer.stepper.batches)
    trainer.stepper.close()
    assert len(micro_batches) == 4
    tokens, documents, targets = (
        torch.cat([getattr(batch, name) for batch in micro_batches])
        for name in ("tokens", "document_ids", "targets")
    )
    expected = F.cross_entropy(model(tokens, documents).flatten(0, 1), targets.flatten())
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # fp32 sums over 128 tokens in another order: some 10 roundings of 6e-8 of the largest term.
    torch.testing.assert_close(
        trainer.stepper.forward_backward(micro_batches), expected.detach(), rtol=1e-5, atol=0
    )
    for name, parameter in trainer.stepper.model.named_parameters():
        atol = 2e-6 * gradients[name].abs().max().item()
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-5, atol=atol)
    trainer.stepper.optimizer.zero_grad()
    trainer.stepper.batches = iter([micro_batches])
    result = trainer.stepper.step()
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=0)
    norm = nn.utils.get_total_norm(gradients.values())
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)


def test_clipping_matters_in_the_plain_loop_s_run(corpora):
    """So that the equality above covers it."""
    trainer = tiny_trainer(corpora / "clipped", "full_rank")
    norms = [trainer.stepper.step().grad_norm.item() for _ in range(20)]
    trainer.stepper.close()
    assert max(norms) > 1.0


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_accumulated_micro_batches_equal_one_big_batch(corpora, method):
    gradients = []
    for local_batch_size in ("8", "2", "1"):
        trainer = tiny_trainer(
            corpora / f"accumulate-{local_batch_size}",
            method,
            "--training.local_batch_size",
            local_batch_size,
        )
        micro_batches = next(trainer.stepper.batches)
        assert len(micro_batches) == 8 // int(local_batch_size)
        loss = trainer.stepper.forward_backward(micro_batches)
        trainer.stepper.close()
        gradients.append(
            [loss, *(p.grad.full_tensor() for p in trainer.stepper.model.parameters() if p.requires_grad)]
        )
    for accumulated in gradients[1:]:
        for one, other in zip(gradients[0], accumulated, strict=True):
            # fp32 sums over 128 tokens in another order: some 10 roundings of 6e-8 of the largest term.
            torch.testing.assert_close(other, one, rtol=1e-5, atol=2e-6 * one.abs().max().item() + 1e-9)


def test_a_gradient_that_is_not_finite_stops_the_run_and_nothing_is_saved(corpora):
    trainer = tiny_trainer(
        corpora / "stopped", "switchlora", "--training.steps", "3", "--metrics.interval", "100"
    )
    spoil_next_gradient(trainer)
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
def test_a_save_under_way_is_finished_when_ranks_disagree(corpora, monkeypatch, spoil):
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

    def write_when_told(*args: Any) -> Any:
        assert may_write.wait(60)
        return write_data(*args)

    monkeypatch.setattr(ChecksummingWriter, "write_data", write_when_told)
    step = trainer.stepper.step

    def step_then_spoil() -> StepResult:
        result = step()
        if trainer.stepper.state.step == 3:
            assert trainer.checkpointer.latest is None
            spoil(trainer)
            # The save is still under way when the error comes.
            threading.Timer(0.5, may_write.set).start()
        return result

    trainer.stepper.step = step_then_spoil
    with pytest.raises(RanksDisagreeError):
        trainer.train()
    assert trainer.stepper.state.step == 3
    assert trainer.checkpointer.latest.name == "step-000000002"


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_a_skipped_step_changes_no_tensor_switches_nothing_and_does_not_count(corpora, method):
    trainer = tiny_trainer(corpora / "skipped", method, *SKIP)
    train_steps(trainer, 4)
    before, lr_factor = whole_tensors(trainer), trainer.stepper.lr_schedule(trainer.stepper.state.step)
    spoil_next_gradient(trainer)
    assert not trainer.stepper.step().grad_norm.isfinite()
    after = whole_tensors(trainer)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert (
        trainer.stepper.state.step,
        trainer.stepper.state.num_skipped,
        trainer.stepper.state.num_batches,
    ) == (4, 1, 5)
    assert trainer.stepper.lr_schedule(trainer.stepper.state.step) == lr_factor
    loss = trainer.stepper.step().loss
    # float64, multiplied in another order.
    assert trainer.stepper.optimizer.metrics()["optimizer/lr"] == pytest.approx(
        plain_learning_rate(4), rel=1e-14
    )
    trainer.stepper.close()
    assert loss.isfinite()
    assert trainer.stepper.state.step == 5
    changed = [
        name for name, tensor in whole_tensors(trainer).items() if not torch.equal(tensor, before[name])
    ]
    assert changed


def test_a_run_with_a_skipped_step_does_all_its_steps_and_reports_finite_losses(corpora):
    trainer = tiny_trainer(corpora / "skip-run", "switchlora", *SKIP, "--training.steps", "4")
    spoil_next_gradient(trainer)
    reported = {}
    report = trainer.reporter.report
    trainer.reporter.report = lambda step, values: (reported.update({step: values}), report(step, values))
    trainer.train()
    assert trainer.stepper.state.step == 4
    assert trainer.stepper.state.num_skipped == 1
    losses = [values["loss/train"] for values in reported.values() if "loss/train" in values]
    assert losses
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("method", METHOD_KEYS)
def test_evaluation_changes_no_bit_and_repeats_itself(corpora, method):
    has_dropout = "dropout" in METHODS[method.removesuffix(MINI)].config_type.model_fields
    extra = ("--method.dropout", "0.3") if has_dropout else ()
    trainer = tiny_trainer(corpora / "evaluated", method, *extra)
    train_steps(trainer, 2)
    before = whole_tensors(trainer)
    first, second = (
        trainer.evaluators.validation(trainer.stepper.model),
        trainer.evaluators.validation(trainer.stepper.model),
    )
    after = whole_tensors(trainer)
    trainer.stepper.close()
    # Dropout is off, so the same weights give the same loss.
    assert first == second
    assert trainer.stepper.model.training
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_activation_checkpointing_changes_no_loss(corpora, compiled):
    losses = {}
    for mode in ("none", "full", "selective"):
        trainer = tiny_trainer(
            corpora / f"checkpointing-{compiled}-{mode}",
            "switchlora",
            "--activation_checkpoint.mode",
            mode,
            "--compile.blocks",
            compiled,
        )
        losses[mode] = train_steps(trainer, 8)
        trainer.stepper.close()
    assert losses["none"][-1] < losses["none"][0]
    for mode in ("full", "selective"):
        if compiled == "false":
            assert losses[mode] == losses["none"], mode
        else:
            # Other fusions round otherwise; Adam amplifies that where gradients are near zero.
            assert losses[mode] == pytest.approx(losses["none"], rel=1e-5), mode


TEST_SPLIT = ("--data.test_fraction", "0.1", "--evaluation.test_tokens", "320", "--training.steps", "4")


def test_the_trained_model_is_judged_once_on_the_test_split(corpora):
    trainer = tiny_trainer(corpora / "test-split", "full_rank", *TEST_SPLIT)
    trainer.train()
    results = json.loads((corpora / "test-split" / "run" / "results.json").read_text())
    assert results["step"] == 4
    assert results["tokens_seen"] == 4 * 8 * 16
    assert results["loss/test"] == trainer.evaluators.test(trainer.stepper.model)
    assert results["loss/test"] != trainer.evaluators.validation(trainer.stepper.model)
    plain = MODELS.build(tiny_config(corpora / "test-split", "full_rank").model)
    num_trained = sum(parameter.numel() for parameter in plain.parameters())
    assert results["num_parameters"] == {"trainable": num_trained, "frozen": 0, "buffers": 0}
    # Weights and two moments in fp32, and a step count for each tensor.
    num_tensors = len(list(plain.parameters()))
    assert results["memory/state_gib"] * 2**30 == 4 * (3 * num_trained + num_tensors)


def test_a_run_stopped_before_its_results_makes_up_for_them(corpora):
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


def note_at_steps(trainer: Trainer, note: Callable[[], int]) -> list[int]:
    """What `note` gives at the beginning of each step, once they are taken."""
    noted: list[int] = []
    step = trainer.stepper.step

    def noting() -> StepResult:
        noted.append(note())
        return step()

    trainer.stepper.step = noting
    return noted


def test_python_collects_no_garbage_by_itself_while_training(corpora):
    trainer = tiny_trainer(corpora / "collects", "full_rank", "--training.steps", "4")
    may_collect = note_at_steps(trainer, gc.isenabled)
    trainer.train()
    assert may_collect == [True, False, False, False]
    assert gc.isenabled()


def test_python_collects_garbage_again_after_training_that_diverged(corpora):
    trainer = tiny_trainer(corpora / "collects-diverged", "full_rank")
    spoil_next_gradient(trainer)
    with pytest.raises(TrainingDivergedError):
        trainer.train()
    assert gc.isenabled()


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
    """Nothing is collected here between the first step and the fiftieth."""
    folder = corpora / f"leftovers-{request.node.callspec.id}"
    trainer = tiny_trainer(folder, "switchlora", *EVERY_FIVE_STEPS, *overrides)
    counts = note_at_steps(trainer, num_tensors)
    trainer.train()
    # Each stretch has two of each.
    assert least_growth(counts[9::10]) <= 0
